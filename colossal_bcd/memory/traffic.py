"""What an optimizer step sends, from layouts and the rules themselves, which run on tensors without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.low_rank.projection import is_projected, low_rank_layout
from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer
from colossal_bcd.optim import ShardedOptimizer, State
from colossal_bcd.optim.state.stack import Member
from colossal_bcd.optim.state.storage import as_seen
from colossal_bcd.sharding import Collect, Layout, Mesh, Rounds, ShardView, resolve
from colossal_bcd.sharding.rounds import Request, waves

Communicates = Callable[[tuple[str, ...]], bool]
"""Whether a sum over these axes needs another rank."""


@dataclass
class _Waiting:
    """A rule that has asked, for parameters that ask alike."""

    rule: Rounds
    layout: Layout
    count: int
    """Number of these parameters."""
    requests: tuple[Request, ...]


def rounds_of(
    base: ShardedOptimizer[Any], layout: Layout, hyper: Any, communicates: Communicates, *, reduced: bool = False
) -> list[Counter[str]]:
    """Run the rule itself on tensors without data, between refreshes.

    Args:
        base: whose rule it is.
        layout: of a parameter.
        hyper: of its group.
        communicates: as of the mesh.
        reduced: whether an engine hands over low-rank gradients that are averaged already.
    Returns:
        Of each round that needs another rank, the bytes of this parameter that travel over each axis.
    """
    return _rounds(base, [(layout, hyper, 1)], communicates, reduced)


def rounds_of_all(
    base: ShardedOptimizer[Any],
    layouts: Mapping[Any, Layout],
    communicates: Communicates,
    members: Sequence[Sequence[Any]],
    *,
    reduced: bool = False,
) -> list[Counter[str]]:
    """As `rounds_of`, of all parameters: those of a wave travel in one collective for each round and axis.

    Args:
        base: whose rule it is.
        layouts: of the parameters that train.
        communicates: as of the mesh.
        members: parameters of each of its groups, training or not.
        reduced: as of `rounds_of`.
    Returns:
        The rounds of each wave, one wave after the other.
    """
    hypers = [base.hyper_of(group) for group in base.param_groups]
    trained = [
        Member(param, layouts[param], hypers[index], -1, 2, index, 0)
        for index, params in enumerate(members)
        for param in params
        if param in layouts and communicates(layouts[param].axes)
    ]
    found: list[Counter[str]] = []
    known: dict[Hashable, list[Counter[str]]] = {}

    def num_bytes(stack: list[Member]) -> int:
        first = stack[0]
        return base.task_bytes(first.layout, first.hyper, first.param.dtype, len(stack))

    for wave in waves(base.stacked(trained), num_bytes, base.wave_bytes):
        alike = Counter((member.group, member.layout) for stack in wave for member in stack)
        kind = frozenset(alike.items())
        if kind not in known:
            kinds = [(layout, hypers[index], count) for (index, layout), count in alike.items()]
            known[kind] = _rounds(base, kinds, communicates, reduced)
        found += known[kind]
    return found


@torch.no_grad()
def _rounds(
    base: ShardedOptimizer[Any], kinds: Sequence[tuple[Layout, Any, int]], communicates: Communicates, reduced: bool
) -> list[Counter[str]]:
    """Rounds of rules that advance together, as the runner lets them."""
    mesh, sent, rounds = Mesh(), Counter[str](), list[Counter[str]]()
    mesh.communicates = communicates  # type: ignore[method-assign, assignment]
    mesh.begin_all_reduce = partial(_count, sent)  # type: ignore[method-assign]
    with _handed_over(base, kinds) if reduced else nullcontext():
        pending = [
            _Waiting(rule, layout, count, ())
            for rule, (layout, _, count) in zip(_rules(base, kinds), kinds, strict=True)
        ]
        answers: list[tuple[Any, ...] | None] = [None] * len(pending)
        while pending := [each for each, answer in zip(pending, answers, strict=True) if _asks(each, answer)]:
            # The bases that are sought at a refresh would be decomposed by the owner of the whole: here nobody is.
            sums = [[request for request in each.requests if not isinstance(request, Collect)] for each in pending]
            totals = iter(
                resolve([x for each, asked in zip(pending, sums, strict=True) for x in asked * each.count], mesh)
            )
            answers = []
            for each, asked in zip(pending, sums, strict=True):
                mine = iter(list(islice(totals, len(asked) * each.count))[: len(asked)])
                answers.append(tuple(None if isinstance(x, Collect) else next(mine) for x in each.requests))
                if len(asked) < len(each.requests) and communicates(each.layout.axes):
                    sent.update(dict.fromkeys(each.layout.axes, 0))
            if sent:
                rounds.append(sent.copy())
                sent.clear()
    return rounds


def _count(sent: Counter[str], buffer: Tensor, axis: str) -> Callable[[], None]:
    sent.update({axis: buffer.nbytes})
    return lambda: None


def _asks(waiting: _Waiting, answer: tuple[Any, ...] | None) -> bool:
    """Resume a rule; whether it asks again."""
    try:
        waiting.requests = next(waiting.rule) if answer is None else waiting.rule.send(answer)
    except StopIteration:
        return False
    return True


def _rules(base: ShardedOptimizer[Any], kinds: Sequence[tuple[Layout, Any, int]]) -> Iterator[Rounds]:
    """Each of a parameter whose number is -1, -2, and so on."""
    for number, (layout, hyper, _) in enumerate(kinds, 1):
        param = torch.empty(layout.local_shape, device="meta")
        view = ShardView(layout, param, torch.empty_like(param), keys=(-number,))
        specs = base.state_spec(layout, hyper)
        state = State(2, {name: 0 for name, spec in specs.items() if spec.kind == "scalar"})
        for name, spec in specs.items():
            stored = spec.allocate(param)
            if isinstance(stored, Tensor):
                state[name] = as_seen(spec, view, stored)
        yield base.update(view, state, hyper)


@contextmanager
def _handed_over(base: ShardedOptimizer[Any], kinds: Sequence[tuple[Layout, Any, int]]) -> Iterator[None]:
    """Low-rank gradients of what is projected, as of an engine that has averaged them."""
    if not isinstance(base, ReducedGradientOptimizer):
        yield
        return
    given = {
        -number: torch.empty(low_rank_layout(layout, hyper).local_shape, device="meta")
        for number, (layout, hyper, _) in enumerate(kinds, 1)
        if is_projected(layout, hyper)
    }
    base.take_low_rank = given.get  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del base.take_low_rank
