"""A step neither reads a tensor on the host nor copies one between host and device, whichever optimizer takes it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from devices import OPTIMIZERS, WITHOUT_VALUES, no_host_wait, options_of
from host_waits import NoHostWait
from torch import Tensor, nn

from colossal_bcd import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.sharding import Layout, Mesh, TensorSplit

SHAPES = [(64, 48), (64, 48), (33, 7), (8, 4, 3, 3), (64,), (64,), (1,), ()]
STORAGE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16, rounded": (torch.bfloat16, {"rounding": "stochastic"}),
    "8-bit": (torch.float32, {"moment_bits": 8}),
}


def give_gradients(params: Any) -> None:
    for param in params:
        if param.requires_grad:
            param.grad = torch.ones_like(param)


def test_guard_trips() -> None:
    device = torch.ones(3, device="meta")
    with NoHostWait():
        (device + 1).mul_(device)[..., torch.arange(2, device="meta")] = 0.0
        with pytest.raises(AssertionError, match="waits for the device"):
            torch.ones(1).item()
        with pytest.raises(AssertionError, match="waits for the device"):
            bool(torch.ones(1) > 0)
        with pytest.raises(AssertionError, match="by a mask"):
            torch.ones(3)[torch.ones(3) > 0]
        with pytest.raises(AssertionError, match="between host and device"):
            torch.ones(3).to("meta")
        with pytest.raises(AssertionError, match="between host and device"):
            device * torch.tensor(2.0)


@pytest.mark.gpu
def test_guard_of_the_gpu_trips() -> None:
    with no_host_wait("cuda"), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("device", WITHOUT_VALUES)
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_waits_for_nothing(name: str, storage: str, device: str) -> None:
    dtype, options = STORAGE[storage]
    in_8_bits = "8bit" in name
    if storage == "8-bit" and in_8_bits:
        pytest.skip("its moments are in 8 bits without that")
    if (storage == "8-bit" or in_8_bits) and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    params = [nn.Parameter(torch.ones(shape, device=device, dtype=dtype)) for shape in SHAPES]
    optimizer = OPTIMIZERS[name].cls(params, **options_of(name), **options)
    for step in range(3):
        give_gradients(params)
        if step == 0:
            optimizer.step()  # allocates, and refreshes bases
        else:
            with no_host_wait(device):
                optimizer.step()


class Alone(Mesh):
    """A mesh on which this rank hears from nobody."""

    def communicates(self, axes: tuple[str, ...]) -> bool:
        return False


@pytest.mark.parametrize("device", WITHOUT_VALUES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
@pytest.mark.parametrize("name", ["GaLoreAdamW", "Adafactor", "CAME"])
def test_step_of_a_shard_waits_for_nothing(name: str, shape: tuple[int, int], dim: int, device: str) -> None:
    """The rows of GaLore's bases were chosen by indices that came from the host in every step."""
    layout = Layout(shape=shape, split=TensorSplit(axis="tp", dim=dim, rank=1, size=2)).sliced("zero", 0, 1)
    param = nn.Parameter(torch.ones(layout.local_shape, device=device))
    optimizer = OPTIMIZERS[name].cls([param], **options_of(name))
    optimizer.bind({param: layout}, Alone())
    for step in range(2):
        give_gradients([param])
        if step == 0:
            optimizer.step()
        else:
            with no_host_wait(device):
                optimizer.step()


BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm-up": {"lr_warmup_step_afterswitch": 2},
    "importance": {"switch_mode": "importance"},
    "corrected": {"sgd_mode": "all"},
    "residual": {"residual": "keep"},
}


@pytest.mark.parametrize("device", WITHOUT_VALUES)
@pytest.mark.parametrize("options", BLOCKS)
@pytest.mark.parametrize("name", ["AdamW", "Lamb", "CAME", "torch"])
def test_step_of_blocks_waits_for_nothing_between_switches(name: str, options: str, device: str) -> None:
    with torch.device(device):
        model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    model.to(torch.bfloat16)
    build: Any = torch.optim.SGD if name == "torch" else OPTIMIZERS[name].cls
    said = {"switch_block_every": 3, "switch_mode": "ascending", "verbose": 0, **BLOCKS[options]}
    optimizer = BlockOptimizer(build(model.parameters(), lr=1e-2), list(model.named_parameters()), **said)
    for step in range(3):
        give_gradients(model.parameters())
        if step == 1:
            with no_host_wait(device):
                optimizer.step()
        elif step == 0:
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("device", WITHOUT_VALUES)
def test_step_of_shares_waits_for_nothing_between_switches(device: str) -> None:
    """Adjacent ones: the positions of scattered values are counted, at a switch if they are cached."""
    named = [(str(index), nn.Parameter(torch.ones(40, 50, device=device))) for index in range(3)]
    params: list[Tensor] = [param for _, param in named]
    optimizer = BlockOptimizerRatio(
        [{"params": params}], named, lr=1e-2, update_ratio=0.3, switch_every=10, mask_mode="adjacent", verbose=0
    )
    for step in range(3):
        give_gradients(params)
        if step == 0:
            optimizer.step()
        else:
            with no_host_wait(device):
                optimizer.step()
