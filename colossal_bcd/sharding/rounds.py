"""Rules ask, one collective per axis answers.

A rule is a generator; each `yield` is a round: it hands over a tuple of requests and gets back a tuple of tensors.
`run_rounds` advances many rules in lockstep and packs the requests of a round into one flat buffer per axis.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from colossal_bcd.sharding.collect import Collect, collect
from colossal_bcd.sharding.mesh import Mesh
from colossal_bcd.sharding.packing import pack
from colossal_bcd.sharding.wire import from_wire, to_wire, wire_dtype

WAVE_BYTES = 256 * 2**20
"""Default budget for the temporaries of the rules that advance together, in bytes."""


@dataclass(frozen=True)
class Sum:
    """Request: add `value` over the ranks of `axes`."""

    value: Tensor
    axes: tuple[str, ...]
    exact: bool = True
    """Whether a float64 value needs all its digits; else it needs float32's, at any magnitude (see `sharding.wire`)."""


@dataclass(frozen=True)
class Combined:
    """Request made of sums; it resolves to what `finish` makes of their results, in order."""

    sums: tuple[Sum, ...]
    finish: Callable[..., Any]


Request: TypeAlias = Sum | Combined | Collect
Rounds: TypeAlias = Generator[tuple[Request, ...], tuple[Any, ...], None]


@dataclass(frozen=True)
class Task:
    """One parameter's rule with what the runner must know of it."""

    rule: Rounds
    axes: tuple[str, ...]
    """Axes that its requests may name."""
    num_bytes: int
    """Temporaries that it keeps alive between rounds, on the rank that needs most: equal on all ranks."""


def resolve(requests: Sequence[Request], mesh: Mesh) -> list[Any]:
    """Answer the requests of one round: one all-reduce per distinct axis, and one exchange if tensors are collected."""
    collects = [request for request in requests if isinstance(request, Collect)]
    whole = iter(collect(collects, mesh) if collects else ())
    parts = [_sums(request) for request in requests]
    totals = iter(_add_up([part for sums in parts for part in sums], mesh))
    answers: list[Any] = []
    for request, sums in zip(requests, parts, strict=True):
        answer = tuple(next(totals) for _ in sums)
        if isinstance(request, Collect):
            answers.append(next(whole))
        else:
            answers.append(answer[0] if isinstance(request, Sum) else request.finish(*answer))
    return answers


def _sums(request: Request) -> tuple[Sum, ...]:
    if isinstance(request, Collect):
        return ()
    return (request,) if isinstance(request, Sum) else request.sums


def _add_up(sums: list[Sum], mesh: Mesh) -> list[Tensor]:
    """The sums' totals, packed into one buffer per axis, of the dtype that its values need.

    The order of the axes and the packing follow from the requests alone, which follow from layouts; they are the same
    on every rank.
    """
    values = [part.value for part in sums]
    for axis in dict.fromkeys(axis for part in sums for axis in part.axes):
        if not mesh.communicates((axis,)):
            continue
        indices = [i for i, part in enumerate(sums) if axis in part.axes]
        dtype = wire_dtype([values[i] for i in indices], [sums[i].exact for i in indices])
        packed = [to_wire(values[i], dtype) for i in indices]
        buffer = torch.cat(packed)
        mesh.all_reduce(buffer, axis)
        for i, total in zip(indices, buffer.split([part.numel() for part in packed]), strict=True):
            values[i] = from_wire(total, values[i])
    return values


def run_rounds(tasks: Iterable[Task], mesh: Mesh, wave_bytes: int = WAVE_BYTES) -> None:
    """Run rules to their end.

    Rules that need no other rank run one at a time, so that only one rule's temporaries live.  The others advance
    together in waves of at most `wave_bytes` (a single larger rule is a wave of its own): the number of collectives
    is rounds x axes x waves.

    Args:
        tasks: consumed lazily, in the same order on every rank.
        mesh: groups of this rank.
        wave_bytes: budget, the same on every rank.
    """
    for wave in pack(_communicating(tasks, mesh), lambda task: task.num_bytes, wave_bytes):
        _advance([task.rule for task in wave], mesh)


def _communicating(tasks: Iterable[Task], mesh: Mesh) -> Iterator[Task]:
    """Those that need other ranks; the others are run to their end meanwhile."""
    for task in tasks:
        if mesh.communicates(task.axes):
            yield task
        else:
            _advance([task.rule], mesh)


def _advance(rules: list[Rounds], mesh: Mesh) -> None:
    pending = _collect((rule, None) for rule in rules)
    while pending:
        answers = iter(resolve([request for _, asked in pending for request in asked], mesh))
        replies = [(rule, tuple(next(answers) for _ in asked)) for rule, asked in pending]
        pending = _collect(replies)


def _collect(
    replies: Iterable[tuple[Rounds, tuple[Any, ...] | None]],
) -> list[tuple[Rounds, tuple[Request, ...]]]:
    """Resume each rule with its reply (None starts it) and keep those that ask again."""
    pending = []
    for rule, reply in replies:
        try:
            pending.append((rule, next(rule) if reply is None else rule.send(reply)))
        except StopIteration:
            continue
    return pending
