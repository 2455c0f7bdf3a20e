"""Casts of other libraries' LAMB: the numbers, what is refused, what is said."""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes.optim
import colossalai.nn.optimizer as theirs
import pytest
import torch
from registry_cases import STEPS, fused_lamb, param_groups, set_gradients, trained, weights
from torch import Tensor

from colossal_bcd import Lamb
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.compat import DistributedLamb


def assert_equal_training(make: Any, *, distributed: bool = False) -> None:
    """The cast against the original itself on one process.

    Either rounds the two moments, the direction and the weight in float32, in another order: less than 8 roundings of
    a step's change and one of the weight, a step.
    """
    params, cast_params = weights(), weights()
    original = make(param_groups(params))
    if distributed:
        original.setup_distributed()
    want = trained(original, params)
    got = trained(cast(make(param_groups(cast_params))), cast_params)
    for before, ours, reference in zip(weights(), got, want, strict=True):
        change = (reference - before).abs().max().item()
        assert change > 1e-3
        bound = STEPS * 2**-24 * (reference.abs().max().item() + 8 * change)
        assert (ours - reference).abs().max().item() <= bound


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_cast_of_colossalai_lamb_gives_its_numbers(bias_correction: bool, adam: bool) -> None:
    assert_equal_training(functools.partial(theirs.Lamb, bias_correction=bias_correction, adam=adam))


@pytest.mark.parametrize("bias_correction", [False, True])
def test_cast_of_colossalai_distributed_lamb_gives_its_numbers(bias_correction: bool) -> None:
    make = functools.partial(theirs.DistributedLamb, bias_correction=bias_correction)
    assert_equal_training(make, distributed=True)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_compat_distributed_lamb_gives_colossalais_numbers(bias_correction: bool) -> None:
    params, our_params = weights(), weights()
    original = theirs.DistributedLamb(param_groups(params), bias_correction=bias_correction)
    original.setup_distributed()
    ours = DistributedLamb(param_groups(our_params), bias_correction=bias_correction)
    assert ours.defaults["bias_correction"] is bias_correction
    for got, want in zip(trained(ours, our_params), trained(original, params), strict=True):
        torch.testing.assert_close(got, want, rtol=STEPS * 2**-23, atol=STEPS * 2**-23)


def test_compat_distributed_lamb_has_the_defaults_and_refuses_nonsense() -> None:
    group = DistributedLamb(weights()).param_groups[0]
    expected = theirs.DistributedLamb(weights()).param_groups[0]
    assert all(group[key] == value for key, value in expected.items() if key != "params")
    with pytest.raises(ValueError, match="bias_correction"):
        DistributedLamb(weights(), bias_correction="no")  # type: ignore[arg-type]
    assert cast(ours := DistributedLamb(weights())) is ours


def fused_reference(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], nv: bool) -> Tensor:
    """The lines of multi_tensor_lamb_kernel.cu, stage 1 in mode 1 and stage 2, without clipping."""
    beta1, beta2 = group["betas"]
    state["t"] = state.get("t", 0) + 1
    state["m"] = state.get("m", 0) * beta1 + (1 - beta1) * grad
    state["v"] = state.get("v", 0) * beta2 + (1 - beta2) * grad * grad
    corrections = (1 - beta1 ** state["t"], 1 - beta2 ** state["t"]) if group["bias_correction"] else (1, 1)
    denom = (state["v"] / corrections[1]).sqrt() + group["eps"]
    update = state["m"] / corrections[0] / denom + group["weight_decay"] * weight
    ratio = group["lr"]
    if nv or group["weight_decay"] != 0:
        ratio = ratio * (weight.norm() / update.norm())
    return weight - ratio * update


@pytest.mark.parametrize("use_nvlamb", [False, True])
@pytest.mark.parametrize("bias_correction", [0, 1, True])
def test_cast_of_fused_lamb_gives_its_kernels_numbers(bias_correction: int, use_nvlamb: bool) -> None:
    params = weights(torch.float64)
    groups = [{"params": params[:1], "lr": 0.02, "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = cast(fused_lamb(groups, bias_correction=bias_correction, use_nvlamb=use_nvlamb))
    states: list[dict[str, Any]] = [{} for _ in params]
    for step in range(STEPS):
        set_gradients(params, step)
        settings = [optimizer.param_groups[0], *[optimizer.param_groups[1]] * 2]
        want = [
            fused_reference(
                param.detach(), param.grad, state, {**group, "bias_correction": bias_correction}, use_nvlamb
            )
            for param, state, group in zip(params, states, settings, strict=True)
        ]
        optimizer.step()
        for param, reference in zip(params, want, strict=True):
            torch.testing.assert_close(param.detach(), reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=math.inf\) and a plugin with max_norm=1.0"),
        ({"adam_w_mode": 0}, "adam_w_mode=0"),
        ({"grad_averaging": False}, "grad_averaging=False"),
    ],
)
def test_cast_refuses_fused_lamb_that_differs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cast(fused_lamb(weights(), **options))


def test_cast_of_fused_lamb_says_what_a_norm_of_zero_did(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(cast(fused_lamb(param_groups(weights()), max_grad_norm=0.0)), Lamb)
    assert sum("makes every gradient zero" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("name", ["LAMB", "LAMB32bit"])
def test_cast_of_bitsandbytes_lamb_warns_that_the_rule_differs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    ours = cast(getattr(bitsandbytes.optim, name)(param_groups(weights()), lr=0.5))
    assert type(ours) is Lamb
    assert [group["lr"] for group in ours.param_groups] == [0.02, 0.5]
    assert ours.param_groups[0]["eps"] == 1e-8
    assert sum("cast to the LAMB of the paper" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("options", [{"optim_bits": 8}, {"max_unorm": 0.5}])
def test_cast_refuses_bitsandbytes_lamb_that_differs(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="have no equal here"):
        cast(bitsandbytes.optim.LAMB(weights(), **options))
