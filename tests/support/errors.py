"""How far results are from what is wanted, in one number that nothing can hide behind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def largest_error(got: Any, want: Any) -> float:
    """Largest absolute difference of numbers, tensors, or sequences and mappings of them.

    Python's `max(0.0, nan)` is 0.0, so differences must not be folded by it: a table would then pass that is NaN
    everywhere.

    Returns:
        Infinity where a difference is not finite, and where lengths, keys or shapes differ.
    """
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping) or got.keys() != want.keys():
            return math.inf
        return worst(largest_error(got[key], want[key]) for key in want)
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return math.inf
        return worst(largest_error(*pair) for pair in zip(got, want, strict=True))
    got, want = (_tensor(value) for value in (got, want))
    if got.shape != want.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    return worst([(got - want).abs().amax().item()])


def worst(errors: Iterable[float]) -> float:
    """Largest of some errors, infinity where one is NaN, and zero for none."""
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)


def _tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
