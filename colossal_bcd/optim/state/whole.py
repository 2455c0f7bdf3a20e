"""State of DTensors as DTensors of whole shapes, which torch.distributed.checkpoint saves and loads on any mesh.

Moments that are kept in 8 bits are float32 there, as in this package's own files; a `total` (see `StateSpec`) is always
there, as another mesh may need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.optim.state.quantized import dequantize, restore_region
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.sharding import Layout, Mesh, resolve
from colossal_bcd.sharding.dtensor import WholeTensor, is_dtensor, refuse_broadcast
from colossal_bcd.sharding.regions import totals

Specs = Mapping[str, StateSpec]


def whole_states(states: Sequence[tuple[Tensor, Layout, Specs, Mapping[str, Any]]], mesh: Mesh) -> list[dict[str, Any]]:
    """State of each parameter for a state dict; all ranks must call.

    Args:
        states: parameter, its layout, declared and actual state; those of plain tensors stay as they are.
        mesh: of the layouts.
    """
    found: list[dict[str, Any]] = []
    tensors: list[tuple[dict[str, Any], str, WholeTensor, Tensor]] = []
    for param, layout, specs, state in states:
        found.append(dict(state))
        if not is_dtensor(param):
            continue
        for name, spec in specs.items():
            if spec.kind == "scalar":
                continue
            if spec.bits == 8:
                del found[-1][f"{name}_absmax"]
            whole, values = WholeTensor(region_of=spec.region, param=param, layout=layout), _read(name, spec, state)
            tensors.append((found[-1], name, whole, whole.region.values(values)))
            if spec.total is not None and spec.total not in specs:
                whole = WholeTensor(region_of=totals, param=param, layout=layout)
                tensors.append((found[-1], spec.total, whole, _total(layout, name, state)))
    missing = [index for index, (_, _, whole, _) in enumerate(tensors) if whole.is_missing_somewhere]
    filled = dict(
        zip(missing, resolve([tensors[i][2].sum_of_first(tensors[i][3]) for i in missing], mesh), strict=True)
    )
    for index, (state, name, whole, values) in enumerate(tensors):
        state[name] = whole.join(filled.get(index, values))
    refuse_broadcast([(name, state[name]) for state, name, _, _ in tensors])
    return found


def local_state(param: Tensor, layout: Layout, specs: Specs, saved: Mapping[str, Any]) -> dict[str, Any]:
    """State as it is stored, from what `whole_states` returned on this mesh or on another.

    Raises:
        ValueError: something is missing.
    """
    if not is_dtensor(param) or not any(isinstance(value, Tensor) and is_dtensor(value) for value in saved.values()):
        return dict(saved)
    state: dict[str, Any] = {name: value for name, value in saved.items() if not isinstance(value, Tensor)}
    for name, spec in specs.items():
        if name not in saved:
            raise ValueError(
                f"state of a parameter of shape {layout.shape}: got {sorted(saved)}, expected {name!r}. Load it into "
                "an optimizer of the class and options with which it was saved."
            )
        if spec.kind == "scalar":
            continue
        region = spec.region(layout)
        values = WholeTensor(region_of=spec.region, param=param, layout=layout).part(saved[name])
        state.update({part: stored.allocate(param) for part, stored in spec.stored(name).items()})
        if spec.bits == 8:
            restore_region(region, state[name], state[f"{name}_absmax"], values, spec.signed)
        else:
            region.write(state[name], values.to(state[name]))
    return state


def _read(name: str, spec: StateSpec, state: Mapping[str, Any]) -> Tensor:
    stored: Tensor = state[name]
    return dequantize(stored, state[f"{name}_absmax"], spec.signed) if spec.bits == 8 else stored


def _total(layout: Layout, name: str, state: Mapping[str, Any]) -> Tensor:
    """[m] means of the matrices that a rank touches, from its rows or its columns, of which one are whole there."""
    columns_are_divided = layout.split is not None and layout.split.dim == len(layout.shape) - 1
    if not columns_are_divided:
        columns: Tensor = state[f"{name.removesuffix('_row')}_col"]
        return columns.mean(-1)
    return torch.as_tensor(state[name]).view(-1, layout.shape[-2]).mean(-1)
