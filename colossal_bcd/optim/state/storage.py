"""Between what is stored and what rules see: stacks, 8-bit moments, stochastically rounded weights.

n: values of data on this rank; b: members of a stack.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.optim.options import RoundingOptions, Storage
from colossal_bcd.optim.state.quantized import dequantize, quantize_into, refuse_stored, require_library
from colossal_bcd.optim.state.rounding import LOW_PRECISION, is_stochastic, round_into, stream
from colossal_bcd.optim.state.spec import State, StateSpec, require_no_capture
from colossal_bcd.optim.state.stack import Member, Stack
from colossal_bcd.sharding import ShardView, wide
from colossal_bcd.sharding.dtensor import is_dtensor, local_values

logger = logging.getLogger(__name__)


class StoredWeights:
    """The weights of a stack, and their float32 copy where they are rounded stochastically.

    Attributes:
        values: what the rule updates, as the rank stores it, with a leading dim if `lead`.
    """

    def __init__(self, members: Sequence[Member], lead: bool) -> None:
        self._members = members
        self._stack = Stack([local_values(member.param) for member in members], lead)
        first = members[0]
        self._stochastic = is_stochastic(first.hyper, first.param.dtype)
        self.values = self._stack.whole.to(wide(first.param.dtype)) if self._stochastic else self._stack.whole

    def write_back(self, view: ShardView) -> None:
        """Store what the rule has written into the view's `param`."""
        if self._stochastic:
            targets = view.flat(self._stack.whole).view(len(self._members), -1)
            rows = view.param.view(len(self._members), -1)
            for member, target, row in zip(self._members, targets, rows, strict=True):
                round_into(target, row, member.layout, stream(member.hyper.seed, member.key, member.num_steps))
        self._stack.write_back()


class StoredState:
    """The state of a stack's members.

    Args:
        members: see `stacks`.
        states: each member's state as the optimizer keeps it, filled at the first update.
        specs: as `ShardedOptimizer.state_spec` declares.
        lead: whether rules see a leading dim.
    """

    def __init__(
        self,
        members: Sequence[Member],
        states: Sequence[dict[str, Any]],
        specs: Mapping[str, StateSpec],
        lead: bool,
    ) -> None:
        self._specs, self._states = specs, states
        for member, state in zip(members, states, strict=True):
            begin_update(member, state, specs)
        tensors = [part for name, spec in specs.items() if spec.kind != "scalar" for part in spec.stored(name)]
        self._stacks = {name: Stack.of_state(states, name, lead) for name in tensors}

    def seen(self, view: ShardView) -> State:
        """What the rule sees and writes in place."""
        first = self._states[0]
        seen = State(first["step"], {name: first[name] for name, spec in self._specs.items() if spec.kind == "scalar"})
        for name, spec in self._specs.items():
            if spec.kind == "scalar":
                continue
            seen[name] = as_seen(spec, view, self._stacks[name].whole)
            if spec.bits == 8:
                absmax = self._stacks[f"{name}_absmax"].whole.view(-1)
                seen[name] = dequantize(seen[name], absmax, spec.signed).to(wide(view.param.dtype))
        return seen

    def write_back(self, view: ShardView, seen: State) -> None:
        """Store what the rule has written."""
        for name, spec in self._specs.items():
            if spec.bits == 8:
                codes, absmax = self._stacks[name].whole, self._stacks[f"{name}_absmax"].whole.view(-1)
                quantize_into(as_seen(spec, view, codes), absmax, seen[name], spec.signed)
        for stack in self._stacks.values():
            stack.write_back()


def begin_update(member: Member, state: dict[str, Any], specs: Mapping[str, StateSpec]) -> None:
    """Fill a parameter's state at its first update, and count this one."""
    if not state:
        for name, spec in specs.items():
            state.update({part: stored.allocate(member.param) for part, stored in spec.stored(name).items()})
    for name, spec in specs.items():
        stored = state.get(name)
        if stored is None:
            raise ValueError(
                f"step: got state of {', '.join(sorted(state))} for a parameter of shape {member.layout.shape}, "
                f"expected {name}, too: a hyper-parameter that asks for it was set after the first step. Set it "
                "before, as small as it may be, or begin the state anew: optimizer.state.clear()."
            )
        if spec.kind in ("elementwise", "low_rank") and (stored.dtype == torch.uint8) != (spec.bits == 8):
            refuse_stored(name, stored, spec.bits)
    state["step"] = member.step


class FusedBatches:
    """Parameters that one of torch's fused kernels updates together: of one param group, update number and dtype."""

    def __init__(self) -> None:
        self._batches: dict[Hashable, tuple[Member, list[str], list[list[Tensor]]]] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []

    def add(self, member: Member, grad: Tensor, state: dict[str, Any], specs: Mapping[str, StateSpec]) -> None:
        """Take a parameter and its gradient in; its state as the optimizer keeps it, and as it is declared."""
        stored = local_values(member.param) if is_dtensor(member.param) else member.param
        weight = stored.contiguous()
        if weight is not stored:
            self._copies.append((stored, weight))
        grad = local_values(grad) if is_dtensor(grad) else grad
        row = fused_row(member, weight, grad.contiguous(), state, specs)
        kind = member.group, member.step, weight.dtype, weight.device
        batch = self._batches.get(kind)
        if batch is None:
            self._batches[kind] = batch = member, ["weight", "grad", *specs], []
        batch[2].append(row)

    def update(self, kernel: Callable[[Mapping[str, list[Tensor]], int, Any], None]) -> None:
        """Update all, by tensors, number of the update and hyper-parameters."""
        for first, names, rows in self._batches.values():
            columns = map(list, zip(*rows, strict=True))
            kernel(dict(zip(names, columns, strict=True)), first.step, first.hyper)
        for stored, weight in self._copies:
            stored.copy_(weight)


def fused_row(
    member: Member, weight: Tensor, grad: Tensor, state: dict[str, Any], specs: Mapping[str, StateSpec]
) -> list[Tensor]:
    """Tensors of one parameter for a fused kernel of torch: of one shape, and of its order in memory.

    Args:
        member: the parameter.
        weight: of it, contiguous.
        grad: of it, contiguous.
        state: as the optimizer keeps it; filled at the first update.
        specs: of the state, which follows the values of the weight.
    """
    begin_update(member, state, specs)
    row, shape, size = [weight, grad], weight.shape, member.layout.num_local
    fits = weight.numel() == size and grad.shape == shape
    for name in specs:
        stored = state[name]
        if not stored.is_contiguous():
            # Kernels go through memory, and state of another optimizer may lie as a weight of other strides did.
            stored = state[name] = stored.contiguous()
        fits = fits and stored.shape == shape
        row.append(stored)
    return row if fits else [tensor.view(-1)[:size] for tensor in row]


def as_seen(spec: StateSpec, view: ShardView, stored: Tensor) -> Tensor:
    """A state tensor as rules see it, a view: moments are flat like the gradient of which they are averages."""
    if spec.kind == "elementwise":
        return view.flat(stored)
    return stored.flatten(-2) if spec.kind == "low_rank" else stored


def require_storable(hyper: object) -> None:
    """Raise ImportError where bitsandbytes is missing and `moment_bits` is 8."""
    if isinstance(hyper, Storage) and hyper.moment_bits == 8:
        require_library()


def stored_temporaries(hyper: object, dtype: torch.dtype) -> int:
    """Bytes per value of a parameter that storage keeps alive while its rule runs, for weights of `dtype`."""
    wide_weight = torch.float32.itemsize if is_stochastic(hyper, dtype) else 0
    wide_moment = wide(dtype).itemsize if isinstance(hyper, Storage) and hyper.moment_bits == 8 else 0
    return wide_weight + wide_moment


def count_step(group: dict[str, Any]) -> None:
    """Count a step of a param group whose random bits depend on it.

    In the group, which outlives the state that a switch of blocks clears: no step repeats another's bits.
    """
    if group.get("rounding") == "stochastic":
        require_no_capture("the random bits of the step")
        group["num_steps"] = group.get("num_steps", 0) + 1


def warn_not_rounded(owner: str, members: Sequence[Member]) -> bool:
    """Say that there is nothing to round, where stochastic rounding is asked for; returns whether that was said."""
    asked = [m for m in members if isinstance(m.hyper, RoundingOptions) and m.hyper.rounding == "stochastic"]
    if not asked or any(member.param.dtype in LOW_PRECISION for member in asked):
        return False
    logger.warning(
        '%s: rounding="stochastic" has no effect on %s weights, such as float32 masters, which are not rounded. '
        "Under a plugin pass master_weights=False.",
        owner,
        asked[0].param.dtype,
    )
    return True
