"""Every optimizer on the device computes what textbook code computes on the CPU in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import conformance_cases
import galore_references
import pytest
import torch
from conformance_cases import CASES, PROJECTION, TABLE, TOLERANCE, Row
from devices import DEVICES, OPTIMIZERS
from support.errors import largest_error
from torch import nn

from colossal_bcd import SGD, GaLoreAdamW, GaLoreAdamW8bit
from colossal_bcd.optim.state.quantized import dequantize

LATE = {"random_from_step": 0}
ROWS: dict[str, Row] = {
    **{name: dataclasses.replace(row, num_steps=5) for name, row in TABLE.items()},
    "galore-adamw8bit, in 32 bits": Row(
        optimizer=GaLoreAdamW8bit,
        reference=galore_references.galore_8bit,
        hyper={**PROJECTION, "state_bits": 32},
        num_steps=5,
    ),
}
for _name, _row in list(ROWS.items()):
    if _name.startswith("galore"):
        late = OPTIMIZERS[_row.optimizer.__name__.replace("GaLore", "GoLore")].cls
        hyper = {key: value for key, value in _row.hyper.items() if key not in ("svd_method", "reproject_momentum")}
        ROWS[_name.replace("galore", "golore")] = dataclasses.replace(_row, optimizer=late, hyper={**hyper, **LATE})
DECAY = {"lr": 1e-2, "weight_decay": 0.1}


def test_rows_are_all_optimizers() -> None:
    assert {row.optimizer for row in ROWS.values()} == {each.cls for each in OPTIMIZERS.values()}


def reference_hyper(row: Row, hyper: dict[str, Any]) -> dict[str, Any]:
    """GoLore's constructor sets what its reference is told."""
    known = {key: value for key, value in hyper.items() if key != "state_bits"}
    return {**known, "reproject_momentum": True} if row.optimizer.__name__.startswith("GoLore") else known


# Those of the table are tried on the CPU in tests/optim/test_conformance.py.
@pytest.mark.parametrize(
    ("name", "device"),
    [
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ROWS),
        *((name, "cpu") for name in ROWS if name not in TABLE),
    ],
)
def test_steps_in_float64_equal_the_reference(name: str, device: str) -> None:
    row = ROWS[name]
    hyper = {**DECAY, **row.hyper}
    wanted = conformance_cases.reference_weights(row, reference_hyper(row, hyper))
    found = conformance_cases.weights_on(torch.device(device), row, hyper)
    for case, want, got in zip(CASES, wanted, found, strict=True):
        assert got.device.type == device
        assert largest_error(got.cpu(), want[-1]) <= TOLERANCE, str(case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_one_step_in_low_precision_is_within_its_roundings(name: str, dtype: torch.dtype, device: str) -> None:
    """A single one: Adam's amplify roundings of the step before."""
    row = ROWS[name]
    hyper = {**DECAY, **row.hyper}
    indices = range(len(conformance_cases.SHAPES))
    starts = [conformance_cases.initial(index).to(dtype) for index in indices]
    grads = [conformance_cases.gradient(index, 6 - index % 5).to(dtype) for index in indices]
    params = [nn.Parameter(start.to(device, copy=True)) for start in starts]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(device)
    row.optimizer(params, **hyper).step()
    for index, (start, grad, param) in enumerate(zip(starts, grads, params, strict=True)):
        told = reference_hyper(row, hyper)
        want = row.reference(start.double(), grad.double(), {"key": index}, **told)
        # The decay and the step each round the weight to its dtype.  The step itself is a few dozen float32 operations
        # and sums of at most 65,472 values, added up as trees of 16 levels.
        largest = torch.stack((start.double(), want)).abs().max().item()
        bound = 2 * torch.finfo(dtype).eps * largest + 64 * 2**-24 * (want - start.double()).abs().max().item()
        assert largest_error(param.detach().cpu(), want) <= bound, tuple(start.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["exact", "subspace"])
def test_projection_by_singular_vectors_does_not_depend_on_the_library(method: str, device: str) -> None:
    """Signs of singular vectors are the library's; between two refreshes AdamW's step is the same for all of them."""
    torch.manual_seed(0)
    shapes = [(64, 48), (30, 50), (33, 7), (8, 4, 3, 3)]
    # Each singular value is a quarter of the one before: the vectors are known to a few 1e-15 of the largest, and the
    # subspace iteration finds them.
    grads = [spread(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    starts = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    params = [nn.Parameter(start.to(device, copy=True)) for start in starts]
    optimizer = GaLoreAdamW(params, lr=1e-2, rank=3, update_proj_gap=100, svd_method=method)
    for _ in range(3):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device)
        optimizer.step()
    for start, grad, param in zip(starts, grads, params, strict=True):
        state: dict[str, Any] = {"key": 0}
        want = start
        for _ in range(3):
            want = galore_references.galore_adamw(want, grad, state, lr=1e-2, rank=3, update_proj_gap=100)
        assert largest_error(param.detach().cpu(), want) <= 1e-9


def spread(grad: torch.Tensor) -> torch.Tensor:
    matrix = grad.reshape(grad.shape[0], -1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * 4.0 ** -torch.arange(len(s), dtype=s.dtype) @ vh).view(grad.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_has_the_cpus_bits(dtype: torch.dtype, device: str) -> None:
    """Of steps that are exact until they are rounded: the learning rate is a power of two, so products are exact."""
    runs = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(where, dtype)) for shape in [(64, 48), (64, 48), (33, 7), (5,)]]
        optimizer = SGD(params, lr=2**-7, rounding="stochastic", seed=3)
        for _ in range(5):
            for param in params:
                param.grad = torch.randn(param.shape).to(where, dtype)
            optimizer.step()
        runs.append([param.detach().cpu() for param in params])
    assert all(map(torch.equal, *runs))
    assert all(len(weights.unique()) > 1 for weights in runs[1])


@pytest.mark.parametrize("device", DEVICES)
def test_moments_in_8_bits_are_within_a_code(device: str) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, grad = torch.randn(33, 70), torch.randn(33, 70)
    param = nn.Parameter(start.to(device, copy=True))
    optimizer = OPTIMIZERS["AdamW"].cls([param], lr=1e-2, moment_bits=8)
    param.grad = grad.to(device)
    optimizer.step()
    state = optimizer.state[param]
    moment, wanted = dequantize(state["exp_avg"], state["exp_avg_absmax"]).cpu().view(-1), 0.1 * grad.view(-1)
    # 0.71 % of the largest among 256 neighbours.
    for first in range(0, wanted.numel(), 256):
        part = slice(first, first + 256)
        assert largest_error(moment[part], wanted[part]) <= 0.0071 * wanted[part].abs().max().item() + 1e-7
