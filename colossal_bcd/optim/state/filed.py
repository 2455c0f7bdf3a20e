"""An optimizer's state as files have it: named tensors whose shapes and dtypes do not depend on the mesh, and numbers.

Moments that are stored in 8 bits are float32 in a file: blocks of values that share a scale begin where a rank's slice
begins.  What was stored comes back bit for bit where the blocks are the same (see `restore_region`), else within the
quantisation error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import TABLES, is_bitsandbytes, scale_region
from colossal_bcd.optim.state.quantized import dequantize, restore_region
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.sharding import Layout, wide
from colossal_bcd.sharding.regions import Region, StackedRegion, elements, totals, whole

Number = int | float | bool | str | None
Kind = Literal["elementwise", "whole", "declared", "stacked", "chunks", "part"]
"""Like the parameter; not at all; as declared; several tensors like the parameter; one value for each chunk that shares
a scale, of one or several tensors; whatever a rank has for its part of the parameter, for that very part only."""


@dataclass(frozen=True, kw_only=True)
class FiledTensor:
    """One tensor of the state of one parameter."""

    name: str
    region: Region
    dtype: torch.dtype
    """In a file."""
    kind: Kind
    """How a reader that knows no declaration cuts it."""
    spec: StateSpec | None = None
    """The declaration, if there is one."""
    mean_of: str | None = None
    """The entry of which this one is the mean over the last dim, for meshes and files that do not have it."""
    kept: bool = True
    """Whether ranks of this mesh keep it."""


def filed_tensors(
    optimizer: Optimizer,
    param: Tensor,
    layout: Layout,
    group: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    constant: Collection[str] = (),
    key: int | None = None,
) -> list[FiledTensor]:
    """What a file has of one parameter's state.

    Args:
        optimizer: a ShardedOptimizer declares its state; of others, the state that is there is taken.
        param: the tensor in the param groups, or one like it.
        layout: its layout.
        group: its param group.
        state: its state, where the optimizer declares none; None: it has none.
        constant: names of undeclared state that does not depend on the parameter; see `constant_names`.
        key: number of the parameter (see `ShardedOptimizer.hyper_of`).
    """
    if isinstance(optimizer, ShardedOptimizer):
        return _declared(param, layout, optimizer.state_spec(layout, optimizer.hyper_of(group, key)))
    return [
        _observed(optimizer, name, tensor, layout, constant)
        for name, tensor in (state or {}).items()
        if isinstance(tensor, Tensor)
    ]


def numbers_of(owner: str, state: Mapping[str, Any]) -> dict[str, Number]:
    """The numbers in one parameter's state; raises ValueError for what is neither a tensor nor a number."""
    numbers: dict[str, Number] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            continue
        if value is not None and not isinstance(value, (int, float, bool, str)):
            raise ValueError(
                f"state {name!r} of {owner}: got a {type(value).__name__}, expected tensors and "
                "plain numbers. Files hold nothing else."
            )
        numbers[name] = value
    return numbers


def filed_like(name: str, tensor: Tensor, layout: Layout) -> FiledTensor:
    """What a file has of one value for each value of a parameter, of its local shape or the data alone, [n]."""
    return FiledTensor(name=name, region=elements(layout), dtype=tensor.dtype, kind="elementwise")


def read(entry: FiledTensor, state: Mapping[str, Any]) -> Tensor:
    """[n] the data of an entry that this rank keeps, in the dtype of files."""
    held = state[entry.name]
    if entry.spec is not None and entry.spec.bits == 8:
        held = dequantize(held, state[f"{entry.name}_absmax"], entry.spec.signed)
    return entry.region.values(held).to(entry.dtype)


def write(entry: FiledTensor, state: Mapping[str, Any], values: Tensor) -> None:
    """Put the data of an entry into allocated state, in place; values: [n] of any dtype."""
    held = state[entry.name]
    if entry.spec is None or entry.spec.bits != 8:
        entry.region.write(held, values)
    else:
        restore_region(entry.region, held, state[f"{entry.name}_absmax"], values, entry.spec.signed)


def allocate(
    optimizer: ShardedOptimizer[Any], param: Tensor, layout: Layout, group: Mapping[str, Any], key: int | None = None
) -> None:
    """Give a parameter the state that its first step would, unless it has state of these shapes."""
    state = optimizer.state[param]
    specs = optimizer.state_spec(layout, optimizer.hyper_of(group, key))
    stored = {part: kept for name, spec in specs.items() for part, kept in spec.stored(name).items()}
    if state and all(kept.kind == "scalar" or state[part].shape == kept.shape for part, kept in stored.items()):
        return
    state.clear()
    state["step"] = 0
    state.update({part: kept.allocate(param) for part, kept in stored.items()})


def _declared(param: Tensor, layout: Layout, specs: Mapping[str, StateSpec]) -> list[FiledTensor]:
    entries = []
    for name, spec in specs.items():
        if spec.kind == "scalar":
            continue
        dtype = torch.float32 if spec.bits == 8 else spec.dtype or wide(param.dtype)
        known: Literal["elementwise", "whole", "declared"] = "declared"
        if spec.kind in ("elementwise", "replicated"):
            known = "elementwise" if spec.kind == "elementwise" else "whole"
        mean_of = next((row for row, other in specs.items() if other.total == name), None)
        entries.append(
            FiledTensor(name=name, region=spec.region(layout), dtype=dtype, kind=known, spec=spec, mean_of=mean_of)
        )
        if spec.total is not None and spec.total not in specs:
            entries.append(
                FiledTensor(name=spec.total, region=totals(layout), dtype=dtype, kind=known, mean_of=name, kept=False)
            )
    return entries


def constant_names(states: Iterable[tuple[tuple[int, ...], Mapping[str, Any]]]) -> set[str]:
    """Names of tensors that have one shape for parameters of several: counters and tables, also where shapes agree.

    Takes the local shape and the undeclared state of every parameter.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    params: dict[str, set[tuple[int, ...]]] = {}
    for shape, state in states:
        for name, tensor in state.items():
            if isinstance(tensor, Tensor):
                shapes.setdefault(name, set()).add(tuple(tensor.shape))
                params.setdefault(name, set()).add(shape)
    return {name for name, found in shapes.items() if len(found) == 1 and len(params[name]) > 1}


def _observed(
    optimizer: Optimizer, name: str, tensor: Tensor, layout: Layout, constant: Collection[str]
) -> FiledTensor:
    shape, local = tuple(tensor.shape), layout.local_shape
    if layout.slice is not None and shape[-1:] == (layout.num_local,):
        local = shape[-1:]  # a slice without padding
    lead = shape[: len(shape) - len(local)]
    region = scale_region(name, tensor, layout) if is_bitsandbytes(optimizer) and tensor.dim() else None
    kind: Kind = "part"
    if region is not None:
        kind = "chunks"
    elif name in constant or name == "step" or (is_bitsandbytes(optimizer) and name in TABLES):
        kind, region = "whole", whole(shape)
    elif shape == local:
        return filed_like(name, tensor, layout)
    elif lead and lead + local == shape:
        kind, region = "stacked", StackedRegion.of(elements(layout), lead)
    elif tensor.numel() == 1:
        kind, region = "whole", whole(shape)
    return FiledTensor(name=name, region=region or whole(shape), dtype=tensor.dtype, kind=kind)
