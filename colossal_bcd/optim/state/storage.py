"""Between what is stored and what rules see: stacks, 8-bit entries, stochastically rounded weights.

n: values of data on this rank; b: members of a stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from colossal_bcd.optim.state.quantized import dequantize, quantize_into, require_stored
from colossal_bcd.optim.state.rounding import is_stochastic, round_into, stream
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.optim.state.stack import Member, Stack
from colossal_bcd.sharding import ShardView, wide


class StoredWeights:
    """The weights of a stack, and their float32 copy where they are rounded stochastically.

    Attributes:
        values: what the rule updates, of the parameters' local shape, with a leading dim if `lead`.
    """

    def __init__(self, members: Sequence[Member], lead: bool) -> None:
        self._members = members
        self._stack = Stack([member.param.detach() for member in members], lead)
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
            if not state:
                for name, spec in specs.items():
                    state.update({part: stored.allocate(member.param) for part, stored in spec.stored(name).items()})
            for name, spec in specs.items():
                if spec.kind in ("elementwise", "low_rank"):
                    require_stored(name, state[name], spec.bits)
            state["step"] = member.step
        tensors = [part for name, spec in specs.items() if spec.kind != "scalar" for part in spec.stored(name)]
        self._stacks = {name: Stack.of_state(states, name, lead) for name in tensors}

    def seen(self, view: ShardView) -> dict[str, Any]:
        """What the rule sees and writes in place."""
        seen: dict[str, Any] = {"step": self._states[0]["step"]}
        for name, spec in self._specs.items():
            if spec.kind == "scalar":
                seen[name] = self._states[0][name]
                continue
            whole = self._stacks[name].whole
            seen[name] = view.flat(whole) if spec.kind == "elementwise" else whole
            if spec.bits == 8:
                absmax = self._stacks[f"{name}_absmax"].whole.view(-1)
                seen[name] = dequantize(seen[name], absmax, spec.signed).to(wide(view.param.dtype))
        return seen

    def write_back(self, view: ShardView, seen: Mapping[str, Any]) -> None:
        """Store what the rule has written."""
        for name, spec in self._specs.items():
            if spec.bits == 8:
                codes, absmax = self._stacks[name].whole, self._stacks[f"{name}_absmax"].whole.view(-1)
                codes = view.flat(codes) if spec.kind == "elementwise" else codes
                quantize_into(codes, absmax, seen[name], spec.signed)
        for stack in self._stacks.values():
            stack.write_back()
