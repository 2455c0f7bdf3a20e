"""Low-rank images that travel instead of gradients.

A projection is linear: the average of the gradients' images is the image of their average.  So data-parallel ranks can
project what backward produced and reduce [rank x n] instead of [m x n].

r, c: this tensor-parallel shard as a matrix; q: rank of the bases; W: data-parallel ranks, which divide the shard into
slices; k: rows that begin on this rank's slice; w: its share of the columns.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.low_rank import LowRank, Side
from colossal_bcd.sharding.rounds import Sum


@dataclass(frozen=True, eq=False)
class LowRankGradient:
    """What an optimizer wants of one parameter's gradient at its next step: the image under these bases."""

    layout: Layout
    """Of the parameter on this rank, as a matrix (see `Layout.as_matrix`)."""
    side: Side
    rank: int
    left: Tensor | None
    right: Tensor | None
    """Bases [R, q], [C, q] of the whole matrix, the same on all ranks, float32 or wider."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the shard's image: [r, q] for "right", [q, c] for "left", [q, q] for "full"."""
        return self._shard.shape

    @property
    def numel(self) -> int:
        """Values of the shard's image."""
        return math.prod(self.shape)

    @property
    def divided(self) -> bool:
        """Whether each of the W ranks needs a part of the image only."""
        return self.side != "full"

    @cached_property
    def part_numel(self) -> int:
        """Values of the largest rank's part, where the image is divided."""
        return max(math.prod(part.shape) for part in self._parts)

    def of(self, grad: Tensor) -> Tensor:
        """Image of the gradient of this rank's shard, flat, in the dtype of the bases.

        A low-precision gradient is cast, not the bases: bfloat16 bases would be orthonormal to 2^-8 only.

        Args:
            grad: gradient of the working parameter, of the shard's shape.
        """
        left, right = (None if basis is None else basis.to(grad.device) for basis in (self.left, self.right))
        flat = grad.reshape(-1)[: self._shard_layout.num_local]
        return self._shard.partial(flat, left, right).reshape(-1)

    def rows(self, flat: Tensor) -> Tensor:
        """[W, part_numel] what each rank needs of the shard's image, padded with zeros."""
        image = flat.view(self.shape)
        buffer = image.new_zeros(len(self._parts), self.part_numel)
        for row, part in zip(buffer, self._parts, strict=True):
            row[: math.prod(part.shape)] = self._cut(image, part).reshape(-1)
        return buffer

    def held(self, flat: Tensor, *, partitioned: bool) -> Tensor:
        """What this rank holds of the image (see `LowRank.shape`).

        Args:
            flat: this rank's row of `rows` if `partitioned`, else the whole image of the shard.
            partitioned: see `flat`.
        """
        if partitioned:
            return flat[: math.prod(self._slice.shape)].view(self._slice.shape)
        return self._cut(flat.view(self.shape), self._slice).contiguous()

    def complete(self, held: Tensor) -> Sum:
        """Request the image of the whole matrix: shards along a projected dim are added up."""
        return self._slice.complete(held)

    def square_sum(self, held: Tensor) -> Sum:
        """Request the squared norm of the whole image, from the complete part on each rank."""
        return self._slice.square_sum(held)

    def _cut(self, image: Tensor, part: LowRank) -> Tensor:
        if self.side == "right":
            return image[part.rows]
        return image[:, part.columns] if self.side == "left" else image

    def joined(self, rows: Tensor) -> Tensor:
        """The shard's image, from what each rank holds of it.

        Args:
            rows: [W, part_numel] by rank, as `padded` makes them.
        """
        image = rows.new_zeros(self.shape)
        for row, part in zip(rows, self._parts, strict=True):
            self._cut(image, part).copy_(row[: math.prod(part.shape)].view(part.shape))
        return image

    def padded(self, held: Tensor) -> Tensor:
        """[part_numel] what this rank holds, as long as the longest rank's part."""
        return torch.nn.functional.pad(held.reshape(-1), (0, self.part_numel - held.numel()))

    @property
    def of_shard(self) -> LowRank:
        """The projection of the whole shard."""
        return self._shard

    @cached_property
    def _shard_layout(self) -> Layout:
        return dataclasses.replace(self.layout, slice=None)

    @property
    def _shard(self) -> LowRank:
        return _low_rank(self._shard_layout, self.side, self.rank)

    @property
    def _slice(self) -> LowRank:
        return _low_rank(self.layout, self.side, self.rank)

    @cached_property
    def _parts(self) -> tuple[LowRank, ...]:
        """By rank of the slice's axis."""
        return _low_ranks(self.layout, self.side, self.rank)


# Layers have equal layouts, and every step asks again.
@lru_cache(maxsize=4096)
def _low_rank(layout: Layout, side: Side, rank: int) -> LowRank:
    return LowRank(layout, side, rank)


@lru_cache(maxsize=4096)
def _low_ranks(layout: Layout, side: Side, rank: int) -> tuple[LowRank, ...]:
    piece = layout.slice
    if piece is None:
        return (_low_rank(layout, side, rank),)
    slices = (dataclasses.replace(piece, rank=place) for place in range(piece.size))
    return tuple(_low_rank(dataclasses.replace(layout, slice=part), side, rank) for part in slices)
