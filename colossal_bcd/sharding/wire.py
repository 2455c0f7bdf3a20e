"""In which form sums travel: float32, float64, or float64 values in float32 words.

Squared norms have twice the exponents of their values, so those of float32 tensors need float64.  Where few of them
travel together with many float32 values, doubling the buffer for them would double the bytes of a round; each then
takes `NUM_SLOTS` words, one for every range of magnitudes: a rank writes its value into the slot of its magnitude,
scaled to near 1, the slots are added up one by one, and the total is the sum of the slots, scaled back.  n: values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPAN = 100
"""Powers of two in a slot."""
NUM_SLOTS = 6
"""Slots reach from 2^-300, below the square of the least float32 number, to 2^300, above the sum of all squares."""
_LOWEST = -SPAN * NUM_SLOTS // 2


def wire_dtype(values: Sequence[Tensor], exact: Sequence[bool]) -> torch.dtype:
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


def to_wire(value: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] words for the values, or [NUM_SLOTS n] where float64 ones travel in float32."""
    flat = value.reshape(-1)
    if value.dtype != torch.float64 or dtype == torch.float64:
        return flat.to(dtype)
    exponent = torch.frexp(flat).exponent
    slot = torch.div(exponent - _LOWEST, SPAN, rounding_mode="floor").clamp_(0, NUM_SLOTS - 1).to(torch.int64)
    words = flat.new_zeros(NUM_SLOTS, flat.numel())
    words.scatter_(0, slot.unsqueeze(0), (flat * torch.exp2(-_middle(slot))).unsqueeze(0))
    return words.reshape(-1).to(torch.float32)


def from_wire(words: Tensor, like: Tensor) -> Tensor:
    """The values of added words, in the shape and dtype of what was sent."""
    if words.numel() != like.numel():
        slots = torch.arange(NUM_SLOTS, device=words.device)
        words = (words.view(NUM_SLOTS, -1).to(torch.float64) * torch.exp2(_middle(slots)).unsqueeze(1)).sum(0)
    return words.view(like.shape).to(like.dtype)


def _middle(slot: Tensor) -> Tensor:
    """Middle exponent of a slot, float64."""
    return (slot * SPAN + _LOWEST + SPAN // 2).to(torch.float64)
