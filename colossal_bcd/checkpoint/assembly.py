"""Which tensors a file has, who sends which part of them to the rank that writes, and the sending."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colossal_bcd.block import BlockOptimizerRatio
from colossal_bcd.block.state_dict import Contributor
from colossal_bcd.checkpoint.contributors import contributors_of
from colossal_bcd.checkpoint.trained import Boosted, TrainedTensor
from colossal_bcd.checkpoint.undeclared import MARK, agreed, digest_of, region_of, shared_state, taken_apart
from colossal_bcd.engine.config import communication_device
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.state.filed import FiledTensor, constant_names, filed_like, filed_tensors, numbers_of, read
from colossal_bcd.sharding.regions import Region, covers, whole

MASTER = "master"
"""What the float32 master of a parameter is called among its state."""
LATER = 10**6
"""Where in a parameter's state that of contributors begins."""
WRITER = 0
"""The rank that writes files."""


@dataclass(frozen=True, kw_only=True)
class LocalPart:
    """What one rank announces of one tensor of a file."""

    parameter: str
    state: str
    """Together, with a dot between them, they are the tensor's name in the file."""
    kind: str
    dtype: torch.dtype
    cut: Region
    order: tuple[int, int]
    mean_of: str | None
    held: bool
    part: str | None = None
    """The contributor whose it is, if any."""
    region: str = ""
    """Of undeclared state: see `region_of`."""
    shape: tuple[int, ...] = ()
    """Of undeclared state: that of this rank's tensor."""
    digest: str = ""
    """Of undeclared state that should be the same on all ranks: see `digest_of`."""

    @property
    def name(self) -> str:
        return f"{self.parameter}.{self.state}"


@dataclass(frozen=True, kw_only=True)
class FullTensor:
    """One tensor of a file and where its parts are."""

    parameter: str
    state: str
    part: str | None
    kind: str
    dtype: torch.dtype
    cut: Region
    """Of any of its parts, for the whole."""
    sources: tuple[tuple[int, Region], ...]
    """Ranks that send, with what they send; none for a mean that no rank keeps."""
    mean_of: str | None

    @property
    def name(self) -> str:
        return f"{self.parameter}.{self.state}"

    @property
    def in_state(self) -> bool:
        """Whether it is an entry of the base optimizer's state, not a master or a contributor's."""
        return self.part is None and self.state != MASTER

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cut.shape

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class LocalTensors:
    """The tensors of this rank, by their names in a file.

    Args:
        boosted: the optimizer.
    """

    def __init__(self, boosted: Boosted) -> None:
        self._base = boosted.base
        self._entries: dict[str, tuple[FiledTensor, Mapping[str, Any]]] = {}
        self.pieces: list[LocalPart] = []
        self.numbers: dict[str, dict[str, Any]] = {}
        self.part_numbers: dict[str, dict[str, dict[str, Any]]] = {}
        self.regions: dict[str, str] = {}
        """Of each parameter with state: see `region_of`."""
        self.shared = shared_state(self._base)
        self.groups: list[list[tuple[int, str]]] = [[] for _ in boosted.groups()]
        self.waiting: list[tuple[int, str]] = []
        everything = [] if isinstance(self._base, ShardedOptimizer) else [*boosted.held(), *boosted.waiting()]
        apart = [(held.layout.local_shape, taken_apart(boosted.state(held))[0]) for held in everything]
        self._constant = constant_names(apart)
        for held in boosted.held():
            self.groups[held.group].append((held.key, held.name))
            self._add(boosted, held)
        if isinstance(self._base, BlockOptimizerRatio) and any(map(boosted.state, boosted.waiting())):
            raise ValueError(
                "save_optimizer: adapters wait (lora_mode) with BlockOptimizerRatio's state of earlier shares, "
                'expected none. Use adapter_state="reset", or another base optimizer.'
            )
        for held in boosted.waiting():
            self.waiting.append((held.key, held.name))
            self._add(boosted, held)
        for part, contributor in contributors_of(boosted).items():
            self._add_part(boosted, part, contributor)

    def values(self, name: str) -> Tensor:
        """[n] this rank's data of a tensor."""
        if name in self._entries:
            entry, state = self._entries[name]
            return read(entry, state)
        entry, state = self._entries[name.rpartition(MARK)[0]]
        return state[entry.name].reshape(-1)

    def _add(self, boosted: Boosted, held: TrainedTensor) -> None:
        tensor, state = boosted.tensor(held), boosted.state(held)
        if held.has_master:
            self._announce(held.name, filed_like(MASTER, tensor, held.layout), {MASTER: tensor.detach()}, (held.key, 0))
        if not state:
            return
        region = ""
        if isinstance(self._base, ShardedOptimizer):
            self.numbers[held.name] = numbers_of(boosted.rule, state)
        else:
            state, self.numbers[held.name] = taken_apart(state)
            region = self.regions[held.name] = region_of(held.layout)
        group = boosted.groups()[held.group]
        entries = filed_tensors(self._base, tensor, held.layout, group, state, self._constant)
        for place, entry in enumerate(entries, start=1):
            self._announce(held.name, entry, state, (held.key, place), region=region)

    def _add_part(self, boosted: Boosted, part: str, contributor: Contributor) -> None:
        place = LATER
        for param, state, entries in contributor.filed():
            name = boosted.names[id(param)]
            self.part_numbers.setdefault(part, {})[name] = numbers_of(part, state)
            for entry in entries:
                self._announce(name, entry, state, (boosted.wrapper._keys[id(param)], place), part)
                place += 1

    def _announce(
        self,
        parameter: str,
        entry: FiledTensor,
        state: Mapping[str, Any],
        order: tuple[int, int],
        part: str | None = None,
        region: str = "",
    ) -> None:
        before = "" if part is None else f"{part}."
        same = bool(region) and entry.kind == "whole" and _world() > 1
        piece = LocalPart(
            parameter=parameter,
            state=f"{before}{entry.name}",
            kind=entry.kind,
            dtype=entry.dtype,
            cut=entry.region,
            order=order,
            mean_of=None if entry.mean_of is None else f"{parameter}.{before}{entry.mean_of}",
            held=entry.kept,
            part=part,
            region=region,
            shape=tuple(state[entry.name].shape) if region else (),
            digest=digest_of(state[entry.name]) if same else "",
        )
        self._entries[piece.name] = entry, state
        self.pieces.append(piece)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The same on every rank."""

    tensors: list[FullTensor]
    numbers: dict[str, dict[str, Any]]
    """In the state of each parameter."""
    own_numbers: dict[str, dict[str, dict[str, Any]]]
    """The same of parameters of which ranks have different ones: by region."""
    shared: list[list[Any]]
    """State of the base optimizer that belongs to no parameter; see `shared_state`."""
    part_numbers: dict[str, dict[str, dict[str, Any]]]
    """The same of contributors, by their names."""
    groups: list[list[str]]
    """Names of the parameters of each group."""
    waiting: list[str]
    """Names of the parameters that do not train now, but keep their masters and state."""
    keys: dict[str, int]


def make_assembly(own: LocalTensors) -> Assembly:
    """Agree who sends what: one exchange of names.

    Raises:
        CheckpointError: on every rank; see `agreed`.
    """
    mine = (own.pieces, own.numbers, own.part_numbers, [*own.groups, own.waiting], own.regions, own.shared)
    reports: list[Any] = [mine]
    if _world() > 1:
        reports = [None] * _world()
        dist.all_gather_object(reports, mine)
    pieces: dict[str, list[tuple[int, LocalPart]]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    own_numbers: dict[str, dict[str, dict[str, Any]]] = {}
    part_numbers: dict[str, dict[str, dict[str, Any]]] = {}
    members: list[set[tuple[int, str]]] = [set() for _ in mine[3]]
    for rank, (announced, of_state, of_parts, groups, regions, _) in enumerate(reports):
        for piece in announced:
            pieces.setdefault(piece.name, []).append((rank, piece))
        for name, values in of_state.items():
            numbers.setdefault(name, values)
            if name in regions:
                own_numbers.setdefault(name, {}).setdefault(regions[name], values)
        for part, of_part in of_parts.items():
            part_numbers[part] = {**of_part, **part_numbers.get(part, {})}
        for index, group in enumerate(groups):
            members[index].update(group)
    ordered = sorted(_by_region(pieces), key=lambda parts: (parts[0][1].order, parts[0][1].name))
    tensors = [_whole(parts) for parts in ordered]
    *groups, waiting = ([name for _, name in sorted(group)] for group in members)
    return Assembly(
        tensors=tensors,
        numbers=numbers,
        own_numbers={name: of for name, of in own_numbers.items() if len(set(map(repr, of.values()))) > 1},
        shared=agreed(report[-1] for report in reports),
        part_numbers=part_numbers,
        groups=groups,
        waiting=waiting,
        keys={name: key for group in members for key, name in group},
    )


def _by_region(pieces: Mapping[str, list[tuple[int, LocalPart]]]) -> list[list[tuple[int, LocalPart]]]:
    """Parts of each tensor, where state that ranks cannot put together is a tensor of its own for every region."""
    result = []
    for parts in pieces.values():
        first = parts[0][1]
        alike = all(piece.kind == first.kind and piece.digest == first.digest for _, piece in parts)
        if alike and first.kind != "part":
            result.append(parts)
            continue
        regions: dict[str, list[tuple[int, LocalPart]]] = {}
        for rank, piece in parts:
            name, cut = f"{piece.state}{MARK}{piece.region}", whole(piece.shape)
            apart = dataclasses.replace(piece, state=name, cut=cut, kind="part")
            regions.setdefault(piece.region, [(rank, apart)])
        result += regions.values()
    return result


def _whole(parts: list[tuple[int, LocalPart]]) -> FullTensor:
    first = parts[0][1]
    sources: dict[tuple[int, ...], tuple[int, Region]] = {}
    for rank, piece in parts:
        if piece.held and piece.cut.numel > 0:
            sources.setdefault(piece.cut.key, (rank, piece.cut))
    is_held = any(piece.held for _, piece in parts)
    assert not is_held or covers([piece.cut for _, piece in parts]), f"parts of {first.name} are missing"
    return FullTensor(
        parameter=first.parameter,
        state=first.state,
        part=first.part,
        kind=first.kind,
        dtype=first.dtype,
        cut=first.cut,
        sources=tuple(sources.values()) if is_held else (),
        mean_of=first.mean_of,
    )


def assembled(
    plan: Assembly, own: LocalTensors, *, everywhere: bool = False
) -> Iterator[tuple[FullTensor, Tensor | None]]:
    """The tensors of a file, one at a time and in order, on the writer; None on the other ranks.

    Every rank has to exhaust it.  Each part travels once.

    Args:
        plan: the same on every rank.
        own: this rank's tensors.
        everywhere: send each tensor to all ranks.
    """
    rows: dict[str, Tensor] = {}
    wanted = {tensor.mean_of for tensor in plan.tensors}
    for tensor in plan.tensors:
        whole = _assemble(tensor, own, rows)
        if whole is not None and tensor.name in wanted:
            rows[tensor.name] = whole
        if everywhere:
            whole = _spread(tensor, whole)
        yield tensor, whole
        if tensor.mean_of is not None:
            rows.pop(tensor.mean_of, None)
        del whole


def _assemble(tensor: FullTensor, own: LocalTensors, rows: Mapping[str, Tensor]) -> Tensor | None:
    rank = dist.get_rank() if _world() > 1 else WRITER
    if tensor.mean_of is not None and not tensor.sources:
        return rows[tensor.mean_of].mean(-1) if rank == WRITER else None
    whole = torch.empty(tensor.cut.buffer_shape, dtype=tensor.dtype) if rank == WRITER else None
    for source, cut in tensor.sources:
        if source == rank:
            values = own.values(tensor.name)
            if whole is not None:
                cut.fill(whole, values)
            else:
                dist.send(_bytes(values.to(communication_device())), WRITER)
        elif whole is not None:
            received = torch.empty(cut.numel, dtype=tensor.dtype, device=communication_device())
            dist.recv(_bytes(received), source)
            cut.fill(whole, received)
    return None if whole is None else tensor.cut.as_filed(whole)


def _spread(tensor: FullTensor, whole: Tensor | None) -> Tensor:
    if whole is None:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    if _world() > 1:
        sent = whole.to(communication_device())
        dist.broadcast(_bytes(sent), WRITER)
        whole = sent.cpu()
    return whole


def _bytes(values: Tensor) -> Tensor:
    """A view: backends need not know the dtype."""
    return values.contiguous().view(-1).view(torch.uint8)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
