"""Which tensors a file has, which rank sends which region of each to the rank that writes, and the sending."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colossal_bcd.block import BlockOptimizerRatio
from colossal_bcd.block.trained import Contributor
from colossal_bcd.checkpoint.trained import Boosted, TrainedTensor
from colossal_bcd.checkpoint.values import MARK, agreed, digest_of, shared_state, taken_apart, words_of
from colossal_bcd.engine.agreement import gathered, num_ranks
from colossal_bcd.engine.config import communication_device
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.state.filed import FiledTensor, constant_names, filed_like, filed_tensors, numbers_of, read
from colossal_bcd.sharding.regions import Region, covers, whole

MASTER = "master"
"""What the float32 master of a parameter is called among its state."""
LATER = 10**6
"""Order of the first tensor of a contributor among those of a parameter: after masters and state."""
WRITER = 0
"""The rank that writes files."""


@dataclass(frozen=True, kw_only=True)
class LocalPart:
    """What one rank announces of one tensor of a file."""

    parameter: str
    state: str
    """Parameter and state, with a dot between them, are the tensor's name in the file."""
    contributor: str | None
    """The contributor that keeps it; None: the base optimizer, or the engine a master."""
    kind: str
    dtype: torch.dtype
    region: Region
    mean_of: str | None
    order: tuple[int, int]
    kept: bool
    """Whether this rank has values of it, beside announcing that files have it."""
    words: str = ""
    """The region of undeclared state in words; see `words_of`."""
    local_shape: tuple[int, ...] = ()
    """Shape of this rank's tensor of undeclared state."""
    has_values: bool = True
    """Whether the rank has values of the parameter, which undeclared state is known by; True of declared state."""
    digest: str = ""
    """Digest of undeclared state that should be the same on all ranks; see `digest_of`."""

    @property
    def name(self) -> str:
        return f"{self.parameter}.{self.state}"


@dataclass(frozen=True, kw_only=True)
class FullTensor(LocalPart):
    """One tensor of a file and the ranks that have its regions, as the first of them announces it."""

    sources: tuple[tuple[int, Region], ...]
    """Ranks that send, with what they send; none for a mean that no rank keeps."""

    @property
    def in_state(self) -> bool:
        """Whether it is part of the base optimizer's state, not a master or a contributor's."""
        return self.contributor is None and self.state != MASTER

    @property
    def shape(self) -> tuple[int, ...]:
        return self.region.shape

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class LocalTensors:
    """The tensors of this rank, by their names in a file."""

    def __init__(self, boosted: Boosted) -> None:
        self._base = boosted.base
        self._filed: dict[str, tuple[FiledTensor, Mapping[str, Any]]] = {}
        self.announced: list[LocalPart] = []
        self.numbers: dict[str, dict[str, Any]] = {}
        self.contributor_numbers: dict[str, dict[str, dict[str, Any]]] = {}
        self.words: dict[str, str] = {}
        """Region of each parameter with undeclared state, in words."""
        self.shared = shared_state(self._base)
        self.members: list[list[tuple[int, str]]] = [[] for _ in (*boosted.groups(), "waiting")]
        """Numbers and names of the parameters of each group, and of those that wait."""
        active, waiting = boosted.active(), boosted.waiting()
        # Nothing is learnt from parameters of which this rank has no values: all of their state is empty alike.
        apart = [each for each in (*active, *waiting) if each.layout.num_local]
        if isinstance(self._base, ShardedOptimizer):
            apart = []
        self._constant = constant_names(
            (trained.layout.local_shape, taken_apart(boosted.state(trained))[0]) for trained in apart
        )
        if isinstance(self._base, BlockOptimizerRatio) and any(map(boosted.state, waiting)):
            raise ValueError(
                "save_optimizer: adapters wait (lora_mode) with BlockOptimizerRatio's state of earlier shares, "
                'expected none. Use adapter_state="reset", or another base optimizer.'
            )
        groups = [*(trained.group for trained in active), *(-1 for _ in waiting)]
        for group, trained in zip(groups, [*active, *waiting], strict=True):
            self.members[group].append((trained.key, trained.name))
            self._add(boosted, trained)
        for name, contributor in boosted.contributors().items():
            self._add_contributor(boosted, name, contributor)

    def values(self, name: str) -> Tensor:
        """[n] this rank's data of a tensor."""
        if name in self._filed:
            return read(*self._filed[name])
        filed, state = self._filed[name.rpartition(MARK)[0]]
        return state[filed.name].reshape(-1)

    def _add(self, boosted: Boosted, trained: TrainedTensor) -> None:
        tensor, state = boosted.tensor(trained), boosted.state(trained)
        if trained.has_master:
            master = filed_like(MASTER, tensor, trained.layout)
            self._announce(trained.name, master, {MASTER: tensor.detach()}, (trained.key, 0))
        if not state:
            return
        words = ""
        if isinstance(self._base, ShardedOptimizer):
            self.numbers[trained.name] = numbers_of(boosted.rule, state)
        else:
            state, self.numbers[trained.name] = taken_apart(state)
            words = self.words[trained.name] = words_of(trained.layout)
        group = boosted.groups()[trained.group]
        files = filed_tensors(self._base, tensor, trained.layout, group, state, self._constant, trained.key)
        for number, filed in enumerate(files, start=1):
            self._announce(
                trained.name, filed, state, (trained.key, number), words=words, has_values=trained.layout.num_local > 0
            )

    def _add_contributor(self, boosted: Boosted, contributor: str, source: Contributor) -> None:
        number = LATER
        for param, state, files in source.filed():
            name = boosted.names[id(param)]
            self.contributor_numbers.setdefault(contributor, {})[name] = numbers_of(contributor, state)
            for filed in files:
                self._announce(name, filed, state, (boosted.wrapper._keys[id(param)], number), contributor)
                number += 1

    def _announce(
        self,
        parameter: str,
        filed: FiledTensor,
        state: Mapping[str, Any],
        order: tuple[int, int],
        contributor: str | None = None,
        words: str = "",
        has_values: bool = True,
    ) -> None:
        before = "" if contributor is None else f"{contributor}."
        same = bool(words) and filed.kind in ("whole", "part") and num_ranks() > 1
        part = LocalPart(
            parameter=parameter,
            state=f"{before}{filed.name}",
            contributor=contributor,
            kind=filed.kind,
            dtype=filed.dtype,
            region=filed.region,
            mean_of=None if filed.mean_of is None else f"{parameter}.{before}{filed.mean_of}",
            order=order,
            kept=filed.kept,
            words=words,
            local_shape=tuple(state[filed.name].shape) if words else (),
            has_values=has_values or not words,
            digest=digest_of(state[filed.name]) if same else "",
        )
        self._filed[part.name] = filed, state
        self.announced.append(part)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What a file has and which rank sends what of it; the same on every rank."""

    tensors: list[FullTensor]
    numbers: dict[str, dict[str, Any]]
    """Plain values in the state of each parameter."""
    numbers_by_region: dict[str, dict[str, dict[str, Any]]]
    """The same of parameters of which ranks have different ones, by the region in words."""
    shared: list[list[Any]]
    """State of the base optimizer that belongs to no parameter; see `shared_state`."""
    contributor_numbers: dict[str, dict[str, dict[str, Any]]]
    """Plain values in the state of contributors, by their names."""
    groups: list[list[str]]
    """Names of the parameters of each group."""
    waiting: list[str]
    """Names of the parameters that do not train now, but keep their masters and state."""
    keys: dict[str, int]


def make_assembly(local: LocalTensors) -> Assembly:
    """Agree who sends what: one exchange of names; raises what `agreed` raises, on every rank."""
    reports = gathered(
        (local.announced, local.numbers, local.contributor_numbers, local.members, local.words, local.shared)
    )
    announced: dict[str, list[tuple[int, LocalPart]]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    by_region: dict[str, dict[str, dict[str, Any]]] = {}
    of_contributors: dict[str, dict[str, dict[str, Any]]] = {}
    members: list[set[tuple[int, str]]] = [set() for _ in local.members]
    for rank, (parts, state_numbers, contributor_numbers, groups, words, _) in enumerate(reports):
        for part in parts:
            announced.setdefault(part.name, []).append((rank, part))
        for name, values in state_numbers.items():
            numbers.setdefault(name, values)
            if name in words:
                by_region.setdefault(name, {}).setdefault(words[name], values)
        for contributor, values in contributor_numbers.items():
            of_contributors[contributor] = {**values, **of_contributors.get(contributor, {})}
        for index, group in enumerate(groups):
            members[index].update(group)
    ordered = sorted(_apart(announced.values()), key=lambda parts: (parts[0][1].order, parts[0][1].name))
    *names, waiting = ([name for _, name in sorted(group)] for group in members)
    return Assembly(
        tensors=[_full(parts) for parts in ordered],
        numbers=numbers,
        numbers_by_region={name: of for name, of in by_region.items() if len(set(map(repr, of.values()))) > 1},
        shared=agreed(report[-1] for report in reports),
        contributor_numbers=of_contributors,
        groups=names,
        waiting=waiting,
        keys={name: key for group in members for key, name in group},
    )


def _apart(tensors: Iterable[list[tuple[int, LocalPart]]]) -> Iterator[list[tuple[int, LocalPart]]]:
    """Make state that ranks cannot put together a tensor of its own for every region."""
    for parts in tensors:
        # Without values of the parameter a rank cannot tell what is empty because it is one value for each of these.
        told = [(rank, part) for rank, part in parts if part.has_values] or parts
        kinds, contents = {part.kind for _, part in told}, {(part.local_shape, part.digest) for _, part in told}
        if kinds == {"whole", "part"} and len(contents) == 1:
            # Nor can one that has values of one parameter alone tell that this shape is that of all parameters.
            told, kinds = [(rank, dataclasses.replace(part, kind="whole")) for rank, part in told], {"whole"}
        if len(kinds) == 1 and "part" not in kinds and len({part.digest for _, part in told}) == 1:
            yield told
            continue
        regions: dict[str, list[tuple[int, LocalPart]]] = {}
        for rank, part in parts:
            name, region = f"{part.state}{MARK}{part.words}", whole(part.local_shape)
            apart = dataclasses.replace(part, state=name, region=region, kind="part")
            regions.setdefault(part.words, []).append((rank, apart))
        yield from regions.values()


def _full(parts: list[tuple[int, LocalPart]]) -> FullTensor:
    first = parts[0][1]
    is_kept = any(part.kept for _, part in parts)
    assert not is_kept or covers([part.region for _, part in parts]), f"regions of {first.name} are missing"
    sources: dict[tuple[int, ...], tuple[int, Region]] = {}
    for rank, part in parts:
        if part.kept and part.region.numel > 0:
            sources.setdefault(part.region.key, (rank, part.region))
    return FullTensor(**vars(first), sources=tuple(sources.values()))


def assembled(
    assembly: Assembly, local: LocalTensors, *, everywhere: bool = False
) -> Iterator[tuple[FullTensor, Tensor | None]]:
    """The tensors of a file, one at a time and in order, on the writer or `everywhere`; None on the other ranks.

    Every rank has to exhaust it.  Each region travels once.
    """
    rows: dict[str, Tensor] = {}
    wanted = {tensor.mean_of for tensor in assembly.tensors}
    for tensor in assembly.tensors:
        full = _assemble(tensor, local, rows)
        if full is not None and tensor.name in wanted:
            rows[tensor.name] = full
        if everywhere:
            full = _spread(tensor, full)
        yield tensor, full
        if tensor.mean_of is not None:
            rows.pop(tensor.mean_of, None)
        del full


def is_writer() -> bool:
    """Whether this rank writes the files."""
    return not dist.is_initialized() or dist.get_rank() == WRITER


def _assemble(tensor: FullTensor, local: LocalTensors, rows: Mapping[str, Tensor]) -> Tensor | None:
    if tensor.mean_of is not None and not tensor.sources:
        return rows[tensor.mean_of].mean(-1) if is_writer() else None
    full = torch.empty(tensor.region.buffer_shape, dtype=tensor.dtype) if is_writer() else None
    rank = dist.get_rank() if num_ranks() > 1 else WRITER
    for source, region in tensor.sources:
        if source == rank:
            values = local.values(tensor.name)
            if full is not None:
                region.fill(full, values)
            else:
                dist.send(_bytes(values.to(communication_device())), WRITER)
        elif full is not None:
            received = torch.empty(region.numel, dtype=tensor.dtype, device=communication_device())
            dist.recv(_bytes(received), source)
            region.fill(full, received)
    return None if full is None else tensor.region.as_filed(full)


def _spread(tensor: FullTensor, full: Tensor | None) -> Tensor:
    if full is None:
        full = torch.empty(tensor.shape, dtype=tensor.dtype)
    if num_ranks() == 1:
        return full
    sent = full.to(communication_device())
    dist.broadcast(_bytes(sent), WRITER)
    return sent.cpu()


def _bytes(values: Tensor) -> Tensor:
    """A view: backends need not know the dtype."""
    return values.contiguous().view(-1).view(torch.uint8)
