"""Assembling whole tensors, each on one rank: two exchanges for any number of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.mesh import Mesh


@dataclasses.dataclass(frozen=True)
class Collect:
    """Request: assemble a tensor on its owner.  Resolves to the global tensor there, to None elsewhere."""

    value: Tensor
    """[n] values of data on this rank."""
    layout: Layout
    owner: int
    """Rank of the slice's axis times the size of the split's axis plus rank of the split's axis."""

    @property
    def place(self) -> tuple[int, int]:
        """The owner's rank on the slice's axis and on the split's axis."""
        split = self.layout.split
        return divmod(self.owner, split.size if split is not None else 1)


def collect(requests: Sequence[Collect], mesh: Mesh) -> list[Tensor | None]:
    """Answer the requests: slices travel to the owner's place on their axis, then shards to the owner."""
    shards = _exchange_slices(requests, mesh)
    return _exchange_shards(requests, shards, mesh)


def _exchange_slices(requests: Sequence[Collect], mesh: Mesh) -> list[Tensor | None]:
    """The data of this rank's shard, where this rank is at the owner's place on the slice's axis."""
    shards: list[Tensor | None] = [request.value for request in requests]
    by_axis: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        piece = request.layout.slice
        if piece is not None and piece.size > 1:
            by_axis.setdefault(piece.axis, []).append(index)
    for axis, indices in by_axis.items():
        pieces = {index: requests[index].layout.slice for index in indices}
        lengths = {
            index: [_at_slice(requests[index].layout, rank).num_local for rank in range(piece.size)]
            for index, piece in pieces.items()
            if piece is not None
        }
        here = {index: piece.rank for index, piece in pieces.items() if piece is not None}
        received = _exchange(
            mesh,
            axis,
            [(requests[index].place[0], requests[index].value) for index in indices],
            [lengths[index] if requests[index].place[0] == here[index] else None for index in indices],
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
            layout, shard, place = requests[index].layout, shards[index], requests[index].place[1]
            assert layout.split is not None
            assert shard is not None
            sends.append((place, shard))
            sizes = [_at_split(layout, rank).shard_data for rank in range(layout.split.size)]
            expected.append(sizes if place == layout.split.rank else None)
        for index, parts in zip(indices, _exchange(mesh, axis, sends, expected), strict=True):
            whole[index] = None if parts is None else requests[index].layout.unshard(parts)
    return whole


def _exchange(
    mesh: Mesh, axis: str, sends: list[tuple[int, Tensor]], expected: list[list[int] | None]
) -> list[list[Tensor] | None]:
    """One all-to-all over `axis`.

    Args:
        mesh: groups of this rank.
        axis: see above.
        sends: destination and flat values of each tensor.
        expected: lengths that each rank sends of it to this rank; None where this rank is not its destination.
    Returns:
        By tensor, the parts from each rank, or None.
    """
    size = mesh.size(axis)
    dtype = torch.float64 if any(value.dtype == torch.float64 for _, value in sends) else torch.float32
    outgoing = [[value.to(dtype) for place, value in sends if place == rank] for rank in range(size)]
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


def _at_slice(layout: Layout, rank: int) -> Layout:
    assert layout.slice is not None
    return dataclasses.replace(layout, slice=dataclasses.replace(layout.slice, rank=rank))


def _at_split(layout: Layout, rank: int) -> Layout:
    assert layout.split is not None
    return dataclasses.replace(layout, split=dataclasses.replace(layout.split, rank=rank))
