"""Bytes that an optimizer needs on one rank beyond the weights, from layouts and declared state.

Tensors may be on the meta device, and no process group is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.block.plan import Plan
from colossal_bcd.block.trained import Trained, trained_of
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.state.stack import STACK_BYTES
from colossal_bcd.sharding import Layout, wide
from colossal_bcd.sharding.dtensor import MeshAxes, layout_of


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on one rank beyond the weights; of a block optimizer, while the block is active that needs most.

    Not counted are activations, and buckets on their way between ranks (`reduce_bucket_size` values each).
    """

    masters: int
    """Masters of what trains now, where they are not the weights themselves, and of adapters that wait."""
    state: int
    """State of the base optimizer."""
    gradients: int
    """Gradients after backward; low-rank gradients are counted whole."""
    step_gradients: int
    """Gradients as the step takes them."""
    temporaries: int
    """Temporaries of the rules that run together; zero for optimizers of other packages, where they are unknown."""
    residuals: int
    """Residuals that `residual="keep"` keeps once every block has trained."""
    correction_state: int
    """State of the correction once everything was corrected."""
    waiting: int
    """Gradients of inactive parameters that wait for the last micro-batch (`accumulation_steps`)."""

    @property
    def between_steps(self) -> int:
        return self.masters + self.state + self.residuals + self.correction_state

    @property
    def after_backward(self) -> int:
        """Between two micro-batches, if there are several."""
        return self.between_steps + self.gradients + self.waiting

    @property
    def in_step(self) -> int:
        return self.between_steps + self.step_gradients + self.temporaries

    @property
    def peak(self) -> int:
        return max(self.after_backward, self.in_step)

    def __str__(self) -> str:
        counted = [field.name for field in fields(self) if isinstance(getattr(self, field.name), int)]
        rows = [*counted, "between_steps", "after_backward", "in_step"]
        return "\n".join(f"{name.replace('_', ' '):<21}{getattr(self, name) / 2**20:>12.1f} MiB" for name in rows)


@dataclass(frozen=True)
class _Trained:
    """A parameter with the param group that trains it."""

    dtype: torch.dtype
    group: dict[str, Any]
    key: int
    """Number of the parameter."""
    layout: Layout
    """A slice in it is a DTensor's."""


def estimate(
    optimizer: Optimizer | Trained,
    *,
    num_shards: int = 1,
    partition_grad: bool = False,
    master_weights: bool = True,
    layouts: Mapping[Any, Layout] | None = None,
) -> Estimate:
    """Bytes that an optimizer needs on one rank.

    Args:
        optimizer: not boosted yet; for boosted ones see `colossal_bcd.booster.estimate`.
        num_shards: ZeRO ranks, over which masters and state are divided.
        partition_grad: whether gradients are, too (stage 2).
        master_weights: whether low-precision weights have float32 masters under the plugin.
        layouts: tensor-parallel layouts of the parameters on this rank; None: as DTensors say, and others are whole.
    Raises:
        ValueError: the optimizer is of another package, and has state that is neither like the parameter nor one value;
            or DTensors are to be divided again.
    """
    trained = trained_of(optimizer)
    base, members = trained.base_optimizer, trained.members
    axes = MeshAxes()
    of = {param: layout_of(param, axes) for group in members for param in group}
    if num_shards > 1 and any(layout.slice is not None for layout in of.values()):
        raise ValueError(
            f"estimate: got num_shards={num_shards} for DTensors, expected 1, as their rows are divided already. Leave "
            "it out."
        )
    if layouts is not None:
        of = {param: layouts[param] for param in of if param in layouts}
    keys = {param: key for key, param in enumerate(itertools.chain.from_iterable(members))}
    by_param = {
        param: _Trained(param.dtype, group, keys[param], of[param])
        for group, params in zip(base.param_groups, members, strict=True)
        for param in params
        if param in of
    }
    counter = _Counter(base, num_shards, partition_grad, master_weights)
    plan = trained.plan
    if plan.schedule.mode == "importance":
        # Which blocks it will draw is not known; any of them may come.
        plan = dataclasses.replace(plan, schedule=dataclasses.replace(plan.schedule, mode="ascending", drawn=()))
    epoch = max(stop - start for start, stop in trained.schedule.ranges)
    turns = [turn * trained.schedule.period for turn in range(epoch)]
    estimates = [_of_block(trained, plan, counter, by_param, num_steps) for num_steps in turns]
    state = 0
    if trained.corrector is not None:
        ever = {name for num_steps in turns for name in plan.corrected_names(num_steps)}
        params = [param for name, param in trained.named_parameters.items() if name in ever and param in by_param]
        state = sum(trained.corrector.num_bytes(param, by_param[param].layout) for param in params)
    return dataclasses.replace(max(estimates, key=lambda each: each.peak), correction_state=state)


def _of_block(
    trained: Trained, plan: Plan, counter: _Counter, by_param: Mapping[Any, _Trained], num_steps: int
) -> Estimate:
    def found(names: Iterable[str]) -> set[Any]:
        return {param for param in map(trained.named_parameters.get, names) if param in by_param}

    corrector = trained.corrector
    active = found(plan.active_names(num_steps))
    kept = found(plan.trained()) & trained.kept - active
    bits = 0 if trained.residual is None else trained.residual.bits
    left = [by_param[param] for param in found(plan.trained()) - active - kept if counter.has_copy(by_param[param])]
    corrected = found(plan.corrected_names(num_steps))
    waits = corrector is not None and corrector.accumulation_steps > 1
    return counter.estimate(
        [by_param[param] for param in active],
        kept=[by_param[param] for param in kept],
        residuals=sum(counter.numel(each) for each in left) * bits // 8,
        waiting=2 * sum(math.prod(by_param[param].layout.local_shape) for param in corrected) * waits,
    )


class _Counter:
    """Counts bytes of one rank.

    Args:
        base: the optimizer that trains.
        num_shards, partition_grad, master_weights: as of `estimate`.
    """

    def __init__(self, base: Optimizer, num_shards: int, partition_grad: bool, master_weights: bool) -> None:
        self._base, self._num_shards = base, num_shards
        self._partition_grad, self._master_weights = partition_grad, master_weights
        self._whole_rows = isinstance(base, ShardedOptimizer) and not base.is_elementwise

    def estimate(self, active: Iterable[_Trained], kept: Iterable[_Trained] = (), **others: int) -> Estimate:
        """Estimate what is active, and what keeps masters and state besides."""
        active, kept = list(active), list(kept)
        entire = sum(math.prod(member.layout.local_shape) * member.dtype.itemsize for member in active)
        parts = sum(self.numel(member) * member.dtype.itemsize for member in active)
        return Estimate(
            masters=sum(map(self._wide_bytes, filter(self.has_copy, active + kept))),
            state=sum(map(self._state, active + kept)),
            gradients=parts if self._partition_grad else entire,
            step_gradients=sum(map(self._wide_bytes, active)),
            temporaries=self._temporaries(active),
            correction_state=0,
            **{"residuals": 0, "waiting": 0, **others},
        )

    def numel(self, member: _Trained) -> int:
        """Count the values on this rank, padding included."""
        return self._layout(member).max_local

    def has_copy(self, member: _Trained) -> bool:
        """Whether the master is another tensor than the weight."""
        return self._num_shards > 1 or self._dtype(member) != member.dtype

    def _wide_bytes(self, member: _Trained) -> int:
        return self.numel(member) * self._dtype(member).itemsize

    def _dtype(self, member: _Trained) -> torch.dtype:
        return wide(member.dtype) if self._master_weights else member.dtype

    def _layout(self, member: _Trained) -> Layout:
        if self._num_shards == 1:
            return member.layout
        return member.layout.sliced("zero", 0, self._num_shards, whole_rows=self._whole_rows)

    def _state(self, member: _Trained) -> int:
        if isinstance(self._base, ShardedOptimizer):
            hyper = self._base.hyper_of(member.group, member.key)
            specs = self._base.state_spec(self._layout(member), hyper)
            return sum(spec.num_bytes(self._dtype(member)) for spec in specs.values())
        per_value, in_all = _probe(self._base, member.group)
        return self.numel(member) * per_value * self._dtype(member).itemsize + in_all

    def _temporaries(self, active: Sequence[_Trained]) -> int:
        """Count those of the largest wave of rules, as `run_rounds` lets them run together."""
        if not isinstance(self._base, ShardedOptimizer):
            return 0
        alone, together, stacked = [0], [0], 0
        limit = min(STACK_BYTES, self._base.wave_bytes)
        for member in active:
            layout = self._layout(member)
            hyper, dtype = self._base.hyper_of(member.group), self._dtype(member)
            num_bytes = self._base.task_bytes(layout, hyper, dtype)
            if self._base.stacks and self._base.task_bytes(layout, hyper, dtype, 2) <= limit:
                num_bytes = self._base.task_bytes(layout, hyper, dtype, 2) // 2
                stacked += 0 if layout.axes else num_bytes
            (together if layout.axes else alone).append(num_bytes)
        return max(*alone, min(stacked, limit), min(sum(together), max(self._base.wave_bytes, *together)))


def _probe(base: Optimizer, group: Mapping[str, Any]) -> tuple[int, int]:
    """Values of state per value of a parameter, and bytes per parameter, of an optimizer that declares none."""
    probe = torch.zeros(2, 3)
    probe.grad = torch.zeros(2, 3)
    build: Any = type(base)
    twin = build([{**{name: value for name, value in group.items() if name != "params"}, "params": [probe]}])
    twin.step()
    per_value, in_all = 0, 0
    for name, value in twin.state[probe].items():
        if isinstance(value, Tensor) and value.shape == probe.shape:
            per_value += 1
        elif isinstance(value, Tensor) and value.numel() == 1:
            in_all += value.nbytes
        elif isinstance(value, Tensor):
            raise ValueError(
                f"estimate: state {name!r} of {type(base).__name__} has shape {tuple(value.shape)} for a parameter of "
                f"{tuple(probe.shape)}, expected one value for each of its values, or one in all. Use an optimizer of "
                "this package, which declares its state."
            )
    return per_value, in_all
