"""State is declared once: allocation, memory estimate and checkpoints read the same declaration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from colossal_bcd.optim.options import Bits
from colossal_bcd.sharding import Layout, LowRank, wide
from colossal_bcd.sharding.low_rank import Side
from colossal_bcd.sharding.regions import (
    Region,
    columns,
    elements,
    low_rank_columns,
    low_rank_region,
    low_rank_rows,
    rows,
    totals,
    whole,
)

Kind = Literal["elementwise", "row", "column", "low_rank", "replicated", "scalar", "block", "entries"]
Shaped: TypeAlias = Layout | LowRank
"""Layout of a parameter, or of its low-rank gradient."""
CHUNK = 256
"""Values that share a scale in 8-bit storage."""


def require_no_capture(what: str) -> None:
    """Refuse to capture what depends on numbers of the host.

    Args:
        what: that the host counts.
    Raises:
        RuntimeError: a CUDA graph is captured.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"step: got the capture of a CUDA graph, expected none, as the update depends on {what}, which the host "
            "counts: every replay would repeat this one. Capture forward and backward alone, or an update that does "
            "not ask for it: SGD, Lion, CAME, AdamW(correct_bias=False), Lamb(bias_correction=False)."
        )


class State(dict[str, Tensor]):
    """What a rule sees of one parameter's state, or of a stack's: tensors, to be written in place.

    Moments are flat like the view's gradient.

    Args:
        step: number of this update, from 1.
        numbers: entries that are plain integers.
    """

    def __init__(self, step: int, numbers: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self._step, self.numbers = step, numbers or {}

    @property
    def step(self) -> int:
        """Number of this update, from 1.

        Raises:
            RuntimeError: a CUDA graph is captured, every replay of which would take the number of this update.
        """
        require_no_capture("the number of the step")
        return self._step

    @property
    def is_first(self) -> bool:
        """Whether this is the first update; a graph that is captured later may ask."""
        return self._step == 1 and self.step == 1


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """One named tensor, or integer, of an optimizer's state for one parameter on this rank."""

    kind: Kind
    """How the entry relates to the parameter, and so how it is sharded: `elementwise` follows every value, `row` and
    `column` follow the rows and columns of the matrix, `scalar` is a Python integer, `block` has one value for each
    `CHUNK` values of this rank's data and cannot be cut or joined by other ranks, `entries` has one for each of some
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
    """The entry belongs to the low-rank gradient that is projected on this side; None: to the parameter itself."""
    total: str | None = None
    """For rows: name of the entry that stores each matrix's mean where a rank cannot compute it; always in files."""

    @classmethod
    def like(cls, layout: Shaped) -> StateSpec:
        """One value for each value of a gradient: of the parameter's, or of the low-rank one."""
        if isinstance(layout, LowRank):
            return cls(kind="low_rank", shape=layout.local_shape, side=layout.side)
        return cls(kind="elementwise", shape=layout.local_shape)

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
            kind = {"low_rank": low_rank_region, "row": low_rank_rows, "column": low_rank_columns}[self.kind]
            held_rank = {"left": 0, "right": -1, "full": 0}[self.side]
            return kind(layout.as_matrix(), self.side, self.shape[held_rank])
        if self.kind == "row":
            return rows(layout)
        return columns(layout) if len(self.shape) == 2 else totals(layout)

    def stored(self, name: str) -> dict[str, StateSpec]:
        """What is kept in the optimizer's state for the entry `name`: itself, or 8-bit codes and scales of chunks."""
        if self.bits == 32:
            return {name: self}
        return {
            name: replace(self, dtype=torch.uint8, bits=32),
            f"{name}_absmax": StateSpec(kind="block", shape=(-(-math.prod(self.shape) // CHUNK),), dtype=torch.float32),
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
