"""Weights of a sharded model as whole tensors, one at a time, and back: files that know of no mesh."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from colossal_bcd.fsdp.torch_private import FSDPModule
from colossal_bcd.sharding.dtensor import MeshAxes, is_dtensor, layout_of, local_values
from colossal_bcd.sharding.regions import elements


def reshard(model: nn.Module) -> None:
    """Free gathered weights: those of the outermost group stay after an evaluation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class WholeTensors(Mapping[str, Any]):
    """A state dict in whole tensors on the CPU, each gathered when it is asked for.

    All ranks must ask for the same ones in the same order.

    Args:
        state: what `model.state_dict()` of a sharded model returns.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Any:
        value = self._state[name]
        if not isinstance(value, Tensor):
            return value
        if is_dtensor(value):
            if value.device.type != value.device_mesh.device_type:  # offloaded
                value = value.to(value.device_mesh.device_type)
            value = value.full_tensor()
        return value.detach().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


@torch.no_grad()
def load_whole(model: Any, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Write whole tensors into a sharded model, of each this rank's part; nothing is sent.

    Args:
        model: its `state_dict()` has parts, as DTensors, and shares memory with it.
        state: whole tensors by name.
        strict: see `require_names`.
    Raises:
        RuntimeError: names or shapes are not those of the model; nothing is changed then.
    """
    ours: Mapping[str, Any] = model.state_dict()
    if strict:
        require_names(ours, state)
    tensors = {name: value for name, value in ours.items() if isinstance(value, Tensor)}
    for name, value in state.items():
        if name in tensors and tuple(value.shape) != tuple(tensors[name].shape):
            raise RuntimeError(
                f"load of the model: got {name!r} of shape {tuple(value.shape)}, expected "
                f"{tuple(tensors[name].shape)}. It is of another model."
            )
    axes, rest = MeshAxes(), {}
    for name, value in state.items():
        part = ours.get(name)
        if not isinstance(part, Tensor) or not is_dtensor(part):
            rest[name] = value
            continue
        local = local_values(part)
        local.copy_(elements(layout_of(part, axes)).pick(value).view(local.shape))
    model.load_state_dict(rest, strict=False)


def require_names(ours: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse names that are missing, but for further names of tied weights, or that the model does not have.

    Args:
        ours: state dict of the model.
        names: of a checkpoint.
    Raises:
        RuntimeError: there are such names.
    """
    given = {_address(ours[name]) for name in names if name in ours}
    missing = [name for name in ours if name not in names and _address(ours[name]) not in given]
    unexpected = [name for name in names if name not in ours]
    if missing or unexpected:
        raise RuntimeError(
            f"load of the model: got a checkpoint without {missing[:3]} and with {unexpected[:3]}, expected the "
            f"{len(ours)} tensors of the model. It is of another model; or pass strict=False."
        )


def _address(value: Any) -> Any:
    """What tied names share; an object of its own for what is no tensor or has no values."""
    if not isinstance(value, Tensor):
        return object()
    local = local_values(value)
    return (local.data_ptr(), tuple(value.shape)) if local.numel() else object()
