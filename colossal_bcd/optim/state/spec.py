"""State is declared once: allocation, memory estimate and checkpoints read the same declaration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from colossal_bcd.sharding import Layout, wide
from colossal_bcd.sharding.low_rank import Side
from colossal_bcd.sharding.regions import (
    Region,
    columns,
    elements,
    image,
    low_rank_columns,
    low_rank_rows,
    rows,
    totals,
    whole,
)

Kind = Literal["elementwise", "row", "column", "low_rank", "replicated", "scalar", "block", "entries"]
Bits = Literal[32, 8]
BLOCK = 256
"""Values that share a scale in 8-bit storage."""


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """One entry of an optimizer's state for one parameter on this rank."""

    kind: Kind
    """How the entry relates to the parameter, and so how it is sharded: `elementwise` follows every value, `row` and
    `column` follow the rows and columns of the matrix, `scalar` is a Python integer, `block` has one value for each
    `BLOCK` values of this rank's data and cannot be cut or joined by other ranks, `entries` has one for each of some
    selected values, and a `region` of its own."""
    shape: tuple[int, ...] = ()
    """Shape stored on this rank, padding included."""
    dtype: torch.dtype | None = None
    """None is the dtype in which the parameter's values are computed (`wide`)."""
    bits: Bits = 32
    """8: an entry that rules see as `dtype` and that is kept as `stored` says."""
    signed: bool = True
    """With 8 bits: whether values may be negative."""
    side: Side | None = None
    """The entry belongs to a low-rank image that was projected on this side; None: to the parameter itself."""
    total: str | None = None
    """Of rows: the entry which on some meshes keeps their mean over each matrix, and which files always have."""

    def __post_init__(self) -> None:
        assert self.bits == 32 or self.kind in ("elementwise", "low_rank")
        assert (self.kind == "low_rank") <= (self.side is not None)

    def region(self, layout: Layout) -> Region:
        """Which part of the whole entry this rank holds.

        Args:
            layout: of the parameter.
        """
        if self.kind == "elementwise":
            return elements(layout)
        if self.kind in ("replicated", "scalar"):
            return whole(self.shape)
        assert self.kind != "block", "the scales of 8-bit storage are in no file"
        if self.side is not None:
            kind = {"low_rank": image, "row": low_rank_rows, "column": low_rank_columns}[self.kind]
            held_rank = {"left": 0, "right": -1, "full": 0}[self.side]
            return kind(layout.as_matrix(), self.side, self.shape[held_rank])
        if self.kind == "row":
            return rows(layout)
        return columns(layout) if len(self.shape) == 2 else totals(layout)

    def stored(self, name: str) -> dict[str, StateSpec]:
        """What is kept in the optimizer's state for the entry `name`: itself, or 8-bit codes and scales of blocks."""
        if self.bits == 32:
            return {name: self}
        return {
            name: replace(self, dtype=torch.uint8, bits=32),
            f"{name}_absmax": StateSpec(kind="block", shape=(-(-math.prod(self.shape) // BLOCK),), dtype=torch.float32),
        }

    def allocate(self, param: torch.Tensor) -> torch.Tensor | int:
        """The entry at step 0 as rules see it: zeros on the parameter's device."""
        if self.kind == "scalar":
            return 0
        return torch.zeros(self.shape, dtype=self.dtype or wide(param.dtype), device=param.device)

    def num_bytes(self, param_dtype: torch.dtype) -> int:
        """Bytes of tensor storage, as stored; scalars have none."""
        if self.kind == "scalar":
            return 0
        if self.bits == 8:
            return sum(part.num_bytes(param_dtype) for part in self.stored("").values())
        return math.prod(self.shape) * (self.dtype or wide(param_dtype)).itemsize
