"""From values that were read out of 8-bit storage back to their codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from colossal_bcd.optim.state.quantized import dequantize, quantize_into
from colossal_bcd.optim.state.spec import BLOCK

ULPS = (0, 1, -1, 2, -2)


def restore_into(codes: Tensor, absmax: Tensor, values: Tensor, signed: bool = True) -> None:
    """Store values, in place, so that what was stored in the same blocks before is stored again bit for bit.

    The largest magnitude of a block is its scale where it is positive.  Else it is the scale times the lowest code,
    which is not -1, so that storing it as usual would shrink the whole block; of the few scales that give it, one that
    gives every value of the block exactly is taken.  Blocks that no scale gives are quantised as usual.

    Args:
        codes: [n] uint8, written.
        absmax: [at least ceil(n / 256)] float32, written.
        values: [n] float32.
        signed: which of the two maps; the largest value of an unsigned block is always its scale.
    """
    if not len(values):
        return
    quantize_into(codes, absmax, values, signed)
    if not signed:
        return
    lowest = dequantize(codes.new_zeros(1), absmax.new_ones(1)).abs()
    num_blocks = -(-len(values) // BLOCK)
    usual = absmax[:num_blocks].clone()
    settled = _exact(codes, absmax, values)
    for ulps in ULPS:
        if bool(settled.all()):
            return
        scale = usual / lowest
        for _ in range(abs(ulps)):
            scale = torch.nextafter(scale, torch.full_like(scale, torch.inf if ulps > 0 else 0.0))
        tried = _nearest(values, scale)
        good = _exact(tried, scale, values) & ~settled
        absmax[:num_blocks] = torch.where(good, scale, absmax[:num_blocks])
        codes.copy_(torch.where(_spread(good, len(values)), tried, codes))
        settled |= good


def _nearest(values: Tensor, scale: Tensor) -> Tensor:
    """[n] the nearest code of every value, by scales of the blocks."""
    table = dequantize(torch.arange(256, dtype=torch.uint8, device=values.device), scale.new_ones(1))
    relative = values / _spread(torch.where(scale > 0, scale, 1), len(values))
    return torch.bucketize(relative, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _exact(codes: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """Of each block whether what is stored is the values."""
    wrong = dequantize(codes, absmax) != values
    pad = -len(values) % BLOCK
    return ~torch.nn.functional.pad(wrong, (0, pad)).view(-1, BLOCK).any(1)


def _spread(of_blocks: Tensor, length: int) -> Tensor:
    """[length] the value of each value's block."""
    return of_blocks.view(-1, 1).expand(-1, BLOCK).reshape(-1)[:length]
