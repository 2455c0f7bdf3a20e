"""Rules ask, one collective per axis answers.

A rule is a generator; each `yield` is a round: it hands over a tuple of requests and gets back a tuple of tensors.
`run_rounds` advances many rules in lockstep and packs the requests of a round into one flat buffer per axis.

Sums travel as float32, as float64, or as float64 values in float32 words.  Squared norms have twice the exponents of
their values, so those of float32 tensors need float64.  Where few of them travel together with many float32 values, a
float64 buffer would double the bytes of a round; each then takes `NUM_SLOTS` words, one for every range of magnitudes:
a rank writes its value into the slot of its magnitude, scaled to near 1, the slots are added up one by one, and the
total is the sum of the slots, scaled back.  n: values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.mesh import Mesh
from colossal_bcd.sharding.packing import pack

T = TypeVar("T")

WAVE_BYTES = 256 * 2**20
"""Default budget for the temporaries of the rules that advance together, in bytes."""
SPAN = 100
"""Powers of two in a slot."""
NUM_SLOTS = 6
"""Slots reach from 2^-300, below the square of the least float32 number, to 2^300, above the sum of all squares."""
_LOWEST = -SPAN * NUM_SLOTS // 2


@dataclass(frozen=True)
class Sum:
    """Request: add `value` over the ranks of `axes`."""

    value: Tensor
    axes: tuple[str, ...]
    exact: bool = True
    """Whether a float64 value needs all its digits; else it needs float32's, at any magnitude."""


@dataclass(frozen=True)
class Combined:
    """Request made of sums; it resolves to what `finish` makes of their results, in order."""

    sums: tuple[Sum, ...]
    finish: Callable[..., Any]


@dataclass(frozen=True)
class Collect:
    """Request: assemble a tensor on its owner.  Resolves to the global tensor there, to None elsewhere."""

    value: Tensor
    """[n] values of data on this rank."""
    layout: Layout
    owner: int
    """Rank of the slice's axis times the size of the split's axis plus rank of the split's axis."""

    @property
    def owner_ranks(self) -> tuple[int, int]:
        """The owner's rank on the slice's axis and on the split's axis."""
        split = self.layout.split
        return divmod(self.owner, split.size if split is not None else 1)


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
    return _run(_resolve(requests, mesh))


Travelling: TypeAlias = Generator[None, None, T]
"""Yields where a collective has begun, of which it needs the result when it goes on."""


def _run(travelling: Travelling[T]) -> T:
    """Run to the end, and wait for each collective at once."""
    while True:
        try:
            next(travelling)
        except StopIteration as end:
            result: T = end.value
            return result


def _resolve(requests: Sequence[Request], mesh: Mesh) -> Travelling[list[Any]]:
    collects = [request for request in requests if isinstance(request, Collect)]
    whole = iter(_collect(collects, mesh) if collects else ())
    parts = [_sums(request) for request in requests]
    totals = iter((yield from _add_up([part for sums in parts for part in sums], mesh)))
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


def _add_up(sums: list[Sum], mesh: Mesh) -> Travelling[list[Tensor]]:
    """The sums' totals, packed into one buffer per axis, of the dtype that its values need.

    The order of the axes and the packing follow from the requests alone, which follow from layouts; they are the same
    on every rank.
    """
    values = [part.value for part in sums]
    for axis in dict.fromkeys(axis for part in sums for axis in part.axes):
        if not mesh.communicates((axis,)):
            continue
        indices = [i for i, part in enumerate(sums) if axis in part.axes]
        dtype = _wire_dtype([values[i] for i in indices], [sums[i].exact for i in indices])
        packed = [_to_wire(values[i], dtype) for i in indices]
        buffer = torch.cat(packed)
        end = mesh.begin_all_reduce(buffer, axis)
        yield
        end()
        for i, total in zip(indices, buffer.split([part.numel() for part in packed]), strict=True):
            values[i] = _from_wire(total, values[i])
    return values


def waves(tasks: Sequence[T], num_bytes: Callable[[T], int], wave_bytes: int) -> Iterator[list[T]]:
    """What advances together: all, or as much as has temporaries of half the budget; see `run_rounds`.

    Args:
        tasks: in the order of the step.
        num_bytes: temporaries of a task.
        wave_bytes: budget.
    """
    fit = sum(map(num_bytes, tasks)) <= wave_bytes
    return pack(tasks, num_bytes, wave_bytes if fit else wave_bytes // 2)


def run_rounds(tasks: Iterable[Task], mesh: Mesh, wave_bytes: int = WAVE_BYTES) -> None:
    """Run rules to their end.

    Rules that need no other rank run one at a time, so that only one rule's temporaries live.  The others advance
    together in waves: the number of collectives is rounds x axes x waves.  One wave has all of them, where its
    temporaries are at most `wave_bytes`; else each has at most half of that (a single larger rule is a wave of its
    own), and while the sums of one travel, the next one computes.

    Args:
        tasks: in the same order on every rank.
        mesh: groups of this rank.
        wave_bytes: budget, the same on every rank.
    """
    waiting: list[Task] = []
    for task in tasks:
        if mesh.communicates(task.axes):
            waiting.append(task)
        else:
            _run(_advance([task.rule], mesh))
    under_way: deque[tuple[Travelling[None], int]] = deque()
    for wave in waves(waiting, _bytes_of, wave_bytes):
        size = sum(map(_bytes_of, wave))
        while under_way and size + sum(other for _, other in under_way) > wave_bytes:
            _turn(under_way)
        under_way.appendleft((_advance([task.rule for task in wave], mesh), size))
        _turn(under_way)
    while under_way:
        _turn(under_way)


def _bytes_of(task: Task) -> int:
    return task.num_bytes


def _turn(under_way: deque[tuple[Travelling[None], int]]) -> None:
    """Let the first wave go on to its next collective; it is the last one then, or gone where it has ended."""
    first, size = under_way.popleft()
    for _ in first:
        under_way.append((first, size))
        return


def _advance(rules: list[Rounds], mesh: Mesh) -> Travelling[None]:
    pending = _resume((rule, None) for rule in rules)
    while pending:
        answers = iter((yield from _resolve([request for _, asked in pending for request in asked], mesh)))
        replies = [(rule, tuple(next(answers) for _ in asked)) for rule, asked in pending]
        pending = _resume(replies)


def _resume(
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


def _collect(requests: Sequence[Collect], mesh: Mesh) -> list[Tensor | None]:
    """Answer the requests: slices travel to the owner's number on their axis, then shards to the owner."""
    shards = _exchange_slices(requests, mesh)
    return _exchange_shards(requests, shards, mesh)


def _exchange_slices(requests: Sequence[Collect], mesh: Mesh) -> list[Tensor | None]:
    """The data of this rank's shard, where this rank has the owner's number on the slice's axis."""
    shards: list[Tensor | None] = [request.value for request in requests]
    by_axis: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        piece = request.layout.slice
        if piece is not None and piece.size > 1:
            by_axis.setdefault(piece.axis, []).append(index)
    for axis, indices in by_axis.items():
        pieces = {index: requests[index].layout.slice for index in indices}
        lengths = {
            index: [requests[index].layout.at(slice_rank=rank).num_local for rank in range(piece.size)]
            for index, piece in pieces.items()
            if piece is not None
        }
        here = {index: piece.rank for index, piece in pieces.items() if piece is not None}
        received = _exchange(
            mesh,
            axis,
            [(requests[index].owner_ranks[0], requests[index].value) for index in indices],
            [lengths[index] if requests[index].owner_ranks[0] == here[index] else None for index in indices],
        )
        for index, parts in zip(indices, received, strict=True):
            shards[index] = None if parts is None else torch.cat(parts)
    return shards


def _exchange_shards(requests: Sequence[Collect], shards: list[Tensor | None], mesh: Mesh) -> list[Tensor | None]:
    whole: list[Tensor | None] = [None] * len(requests)
    by_axis: dict[str, list[int]] = {}
    for index, (request, shard) in enumerate(zip(requests, shards, strict=True)):
        split = request.layout.split
        if shard is None:
            continue
        if split is None or split.size == 1:
            whole[index] = request.layout.unshard([shard])
        else:
            by_axis.setdefault(split.axis, []).append(index)
    for axis, indices in by_axis.items():
        sends, expected = [], []
        for index in indices:
            layout, shard, owner = requests[index].layout, shards[index], requests[index].owner_ranks[1]
            assert layout.split is not None
            assert shard is not None
            sends.append((owner, shard))
            sizes = [layout.at(split_rank=rank).shard_data for rank in range(layout.split.size)]
            expected.append(sizes if owner == layout.split.rank else None)
        for index, parts in zip(indices, _exchange(mesh, axis, sends, expected), strict=True):
            whole[index] = None if parts is None else requests[index].layout.unshard(parts)
    return whole


def _exchange(
    mesh: Mesh, axis: str, sends: list[tuple[int, Tensor]], expected: list[list[int] | None]
) -> list[list[Tensor] | None]:
    """One all-to-all over `axis`.

    Args:
        mesh: groups of this rank.
        axis: one of the mesh.
        sends: destination and flat values of each tensor.
        expected: lengths that each rank sends of it to this rank; None where this rank is not its destination.
    Returns:
        By tensor, the parts from each rank, or None.
    """
    size = mesh.size(axis)
    dtype = torch.float64 if any(value.dtype == torch.float64 for _, value in sends) else torch.float32
    outgoing = [[value.to(dtype) for owner, value in sends if owner == rank] for rank in range(size)]
    mine = [lengths for lengths in expected if lengths is not None]
    empty = sends[0][1].new_zeros(0, dtype=dtype)
    received = mesh.all_to_all(
        torch.cat([empty, *(value for values in outgoing for value in values)]),
        [sum(value.numel() for value in values) for values in outgoing],
        [sum(lengths[rank] for lengths in mine) for rank in range(size)],
        axis,
    )
    by_source = [
        iter(part.split([lengths[rank] for lengths in mine]))
        for rank, part in enumerate(received.split([sum(lengths[rank] for lengths in mine) for rank in range(size)]))
    ]
    return [
        None if lengths is None else [next(parts).to(value.dtype) for parts in by_source]
        for lengths, (_, value) in zip(expected, sends, strict=True)
    ]


def _wire_dtype(values: Sequence[Tensor], exact: Sequence[bool]) -> torch.dtype:
    """The dtype of a buffer; it follows from dtypes and lengths, which are the same on every rank.

    Args:
        values: that travel together.
        exact: see `Sum`.
    """
    doubles = [(value, digits) for value, digits in zip(values, exact, strict=True) if value.dtype == torch.float64]
    if not doubles:
        return torch.float32
    count = sum(value.numel() for value, _ in doubles)
    others = sum(value.numel() for value in values) - count
    # Bytes of a buffer: 8 (others + count) in float64, 4 (others + NUM_SLOTS count) in float32.
    if any(digits for _, digits in doubles) or others <= (NUM_SLOTS - 2) * count:
        return torch.float64
    return torch.float32


def _to_wire(value: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] words for the values, or [NUM_SLOTS n] where float64 ones travel in float32."""
    flat = value.reshape(-1)
    if value.dtype != torch.float64 or dtype == torch.float64:
        return flat.to(dtype)
    exponent = torch.frexp(flat).exponent
    slot = torch.div(exponent - _LOWEST, SPAN, rounding_mode="floor").clamp_(0, NUM_SLOTS - 1).to(torch.int64)
    words = flat.new_zeros(NUM_SLOTS, flat.numel())
    words.scatter_(0, slot.unsqueeze(0), (flat * torch.exp2(-_middle(slot))).unsqueeze(0))
    return words.reshape(-1).to(torch.float32)


def _from_wire(words: Tensor, like: Tensor) -> Tensor:
    """The values of added words, in the shape and dtype of what was sent."""
    if words.numel() != like.numel():
        slots = torch.arange(NUM_SLOTS, device=words.device)
        words = (words.view(NUM_SLOTS, -1).to(torch.float64) * torch.exp2(_middle(slots)).unsqueeze(1)).sum(0)
    return words.view(like.shape).to(like.dtype)


def _middle(slot: Tensor) -> Tensor:
    """Middle exponent of a slot, float64."""
    return (slot * SPAN + _LOWEST + SPAN // 2).to(torch.float64)
