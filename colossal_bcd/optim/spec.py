"""State is declared once: allocation, memory estimate and checkpoints read the same declaration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from colossal_bcd.sharding import wide

Kind = Literal["elementwise", "row", "column", "low_rank", "replicated", "scalar"]


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """One entry of an optimizer's state for one parameter on this rank."""

    kind: Kind
    """How the entry relates to the parameter, and so how it is sharded: `elementwise` follows every value, `row` and
    `column` follow the rows and columns of the matrix, `scalar` is a Python integer."""
    shape: tuple[int, ...] = ()
    """Shape stored on this rank, padding included."""
    dtype: torch.dtype | None = None
    """None is the dtype in which the parameter's values are computed (`wide`)."""

    def allocate(self, param: torch.Tensor) -> torch.Tensor | int:
        """The entry at step 0: zeros on the parameter's device."""
        if self.kind == "scalar":
            return 0
        return torch.zeros(self.shape, dtype=self.dtype or wide(param.dtype), device=param.device)

    def num_bytes(self, param_dtype: torch.dtype) -> int:
        """Bytes of tensor storage; scalars have none."""
        if self.kind == "scalar":
            return 0
        return math.prod(self.shape) * (self.dtype or wide(param_dtype)).itemsize
