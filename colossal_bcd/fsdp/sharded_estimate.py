"""`estimate`: what a rank holds where weights are sharded, too, from layouts and declared state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from colossal_bcd import memory
from colossal_bcd.block.trained import Trained
from colossal_bcd.fsdp.engine import FsdpEngine
from colossal_bcd.memory import Estimate
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.dtensor import MeshAxes, layout_of


@dataclass(frozen=True, kw_only=True)
class ShardedEstimate(Estimate):
    """Bytes on one rank with its part of the weights; of a block optimizer, while the block is active that needs most.

    Not counted are activations, and what a tensor-parallel layer sends.
    """

    weights: int
    """This rank's rows of all weights."""
    gathered_in_forward: int
    """Whole weights of groups that stay, of the one that computes, and of the buffer of one gather."""
    gathered_in_backward: int
    """The same in backward, or the largest group that trains with its gradients and the buffer of their reduction."""
    formula: str
    """The promise of block coordinate descent with this model: bytes of weights, masters, state and gradients in the
    step, but for uneven rows."""

    @property
    def peak(self) -> int:
        moments = (
            self.in_step,
            self.between_steps + self.gathered_in_forward,
            self.after_backward + self.gathered_in_backward,
        )
        return self.weights + max(moments)

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.formula}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that FSDP2 gathers together, as far as bytes depend on it."""

    params: Sequence[Parameter]
    is_outermost: bool = False
    num_shards: int = 1
    """Ranks that share its weights."""
    kept_over: int = 1
    """Ranks over which its weights stay divided from forward to backward; 1: they stay whole."""
    reduce_dtype: torch.dtype | None = None
    """In which gradients travel; None: their own."""


def estimate(engine: FsdpEngine) -> ShardedEstimate:
    """Bytes that a model and its optimizer need on one rank, where FSDP2 shards the weights.

    Args:
        engine: what `attach` has returned.
    """
    trained, axes = engine.trained, MeshAxes()
    of = engine.layouts
    if trained.plan.is_whole:
        of = {param: layout for param, layout in of.items() if param in engine.masters.of}
    groups = [
        Group(
            params=group.params,
            is_outermost=group.module is engine.model,
            num_shards=group.num_shards,
            kept_over=group.kept_over,
            reduce_dtype=group.reduce_dtype,
        )
        for group in engine.groups
    ]
    layouts = {param: layout_of(param, axes) for group in groups for param in group.params}
    return estimate_groups(trained, groups, layouts, of)


def estimate_groups(
    trained: Trained, groups: Sequence[Group], layouts: Mapping[Any, Layout], of: Mapping[Any, Layout] | None = None
) -> ShardedEstimate:
    """The same from layouts, without ranks and without memory.

    Args:
        trained: over the parameters of the groups.
        groups: all of the model.
        layouts: of every parameter, with its slice.
        of: the layouts of those that may train; None: all of them.
    """
    of = layouts if of is None else of
    inner = memory.estimate(trained, layouts=of)
    ever = {trained.named_parameters[name] for name in trained.plan.trained() if name in trained.named_parameters}
    stay = others = largest = backward = 0
    for group in groups:
        of_group = {param: layouts[param] for param in group.params}
        whole = sum(_whole_bytes(param, layout) for param, layout in of_group.items())
        kept_over = 1 if group.is_outermost else group.kept_over
        if kept_over == 1:
            stay += whole
        else:
            others = max(others, whole)
            stay += whole // kept_over if kept_over < group.num_shards else 0
        largest = max(largest, whole)
        trains = {param: layout for param, layout in of_group.items() if param in ever and param in of}
        grads = sum(_whole_bytes(param, layout) for param, layout in trains.items())
        sent = sum(
            _whole_bytes(param, layout) // param.itemsize * (group.reduce_dtype or param.dtype).itemsize
            for param, layout in trains.items()
        )
        backward = max(backward, grads + max(whole if kept_over > 1 else 0, sent))
    # A block in one group is the lowest that backward comes to, where nothing is gathered ahead.
    ahead = others if trained.corrector is not None or _spans_groups(trained, groups) else 0
    weights = sum(layout.max_local * param.itemsize for param, layout in layouts.items())
    fields = {field.name: getattr(inner, field.name) for field in dataclasses.fields(inner)}
    return ShardedEstimate(
        **fields,
        weights=weights,
        gathered_in_forward=stay + others + largest,
        gathered_in_backward=stay + max(2 * others, backward + ahead),
        formula=_formula(trained, inner, weights, layouts),
    )


def _spans_groups(trained: Trained, groups: Sequence[Group]) -> bool:
    """Whether some block has parameters of several groups."""
    home = {param: number for number, group in enumerate(groups) for param in group.params}
    numbers = [{home[param] for param in trained.members_of(index)} for index in range(len(trained.blocks))]
    return any(len(found) > 1 for found in numbers)


def _whole_bytes(param: Parameter, layout: Layout) -> int:
    """Of what one gather makes of a parameter, padding included."""
    size = math.prod(layout.shard_shape) if layout.slice is None else layout.slice.length * layout.slice.size
    return size * param.itemsize


def _formula(trained: Trained, inner: Estimate, weights: int, layouts: Mapping[Any, Layout]) -> str:
    axes = {each.axis: each.size for layout in layouts.values() for each in (layout.split, layout.slice) if each}
    ranks = math.prod(axes.values())
    values = sum(layout.numel for layout in layouts.values())
    names = {name: layouts[param].numel for name, param in trained.named_parameters.items() if param in layouts}
    sizes = [sum(names.get(name, 0) for name in block.parameters) for block in trained.blocks]
    largest = max(sizes, default=0) + sum(names.get(name, 0) for name in trained.always_active)
    per_weight = max((param.itemsize for param in layouts), default=0)
    in_step = inner.masters + inner.state + inner.step_gradients
    per_trained = round(in_step * ranks / largest) if largest else 0
    total = (per_weight * values + per_trained * largest) / ranks / 2**20
    return (
        f"({per_weight}M + {per_trained}b)/N with M = {values}, b = {largest} in the largest block, N = {ranks} ranks: "
        f"{total:.1f} MiB"
    )
