"""8-bit storage of moments (Dettmers et al., arXiv 2110.02861, section 2): a matter of storage, not of math.

Blocks of 256 values of this rank's data share a float32 scale, their largest magnitude; a value is kept as the number
of the nearest one of 256 codes of bitsandbytes' dynamic map, signed or, for second moments, unsigned.  Blocks begin
where the rank's slice begins, so runs on different meshes differ within the quantisation error.  n: values of data on
this rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.optim.functional import require
from colossal_bcd.optim.state.rounding import RoundingHyper
from colossal_bcd.optim.state.spec import BLOCK, Bits

SMALL = 2**-10
"""Values below this part of their scale are settled without the library's CPU kernel, which is coarse there."""


@dataclass(frozen=True, kw_only=True)
class StorageHyper(RoundingHyper):
    """Hyper-parameters of optimizers that can also keep their first moment in 8 bits."""

    moment_bits: Bits = 32
    """Bits of a value of the first moment between steps: 32, or 8 by bitsandbytes' blockwise quantisation with its
    signed dynamic map (arXiv 2110.02861, sections 2.1 and 2.2), whose error is at most 0.71 % of the largest magnitude
    among 256 neighbours.  The second moment stays as it is: it divides, so errors of small values would matter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not isinstance(self.moment_bits, bool) and self.moment_bits in (32, 8),
            "moment_bits",
            self.moment_bits,
            "32 or 8",
        )


def require_library() -> None:
    """Refuse 8-bit moments where they cannot be computed.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    _codes(torch.device("cpu"), True)


def require_stored(name: str, entry: Tensor, bits: Bits) -> None:
    """Refuse state that is stored in other bits than the hyper-parameter says.

    Raises:
        ValueError: they differ.
    """
    if (entry.dtype == torch.uint8) != (bits == 8):
        raise ValueError(
            f"moment_bits={bits}: got {name} stored as {entry.dtype}, expected "
            f"{'8-bit codes' if bits == 8 else 'floating-point values'}. Choose moment_bits before the first step and "
            "keep it; a state that is loaded brings its own."
        )


def dequantize(codes: Tensor, absmax: Tensor, signed: bool = True) -> Tensor:
    """Float32 values in a new tensor of the codes' shape.

    Args:
        codes: uint8, n values.
        absmax: [at least ceil(n / 256)] float32 scales.
        signed: which of the two maps.
    """
    if not codes.numel():
        return torch.empty_like(codes, dtype=torch.float32)
    values: Tensor = _functional().dequantize_blockwise(
        codes.view(-1), absmax=absmax[: _num_blocks(codes)], code=_codes(codes.device, signed), blocksize=BLOCK
    )
    return values.view(codes.shape)


def quantize_into(codes: Tensor, absmax: Tensor, values: Tensor, signed: bool = True) -> None:
    """Store values, in place.

    A value that is not finite makes its whole block not finite: none disappears.  Of an unsigned entry, a value that is
    not zero is not stored as zero: what divides would not be bounded then.

    Args:
        codes: uint8, written.
        absmax: [at least ceil(n / 256)] float32, written.
        values: of any floating dtype, in the shape of the codes; none is negative unless `signed`.
        signed: which of the two maps.
    """
    if not values.numel():
        return
    codes, values = codes.view(-1), values.to(torch.float32).reshape(-1)
    quantized, _ = _functional().quantize_blockwise(values, code=_codes(values.device, signed), blocksize=BLOCK)
    codes.copy_(quantized)
    # The library's own scales pass over NaN, which it then stores as a number.
    whole = len(values) // BLOCK
    body, tail = values[: whole * BLOCK].view(whole, BLOCK), values[whole * BLOCK :]
    torch.linalg.vector_norm(body, torch.inf, dim=1, out=absmax[:whole])
    if len(tail):
        absmax[whole] = torch.linalg.vector_norm(tail, torch.inf)
    if values.device.type == "cpu":
        _settle_small_values(codes, absmax[: _num_blocks(codes)], values, signed)
    if not signed:
        codes.masked_fill_((codes == 0) & (values > 0), 1)


def _settle_small_values(codes: Tensor, absmax: Tensor, values: Tensor, signed: bool) -> None:
    """Give small values their nearest codes.

    The library's CPU kernel tells apart no less than 2^-16 of the scale and stores zero as 2.1e-5 of it.  Divided by
    the root of a second moment that is zero, too, that would move weights that have no gradient.
    """
    scale = torch.where(absmax > 0, absmax, 1).view(-1, 1).expand(-1, BLOCK).reshape(-1)[: len(values)]
    relative = values / scale
    small = relative.abs() < SMALL
    codes[small] = torch.bucketize(relative[small], _middles(signed)).to(torch.uint8)


def _num_blocks(codes: Tensor) -> int:
    return -(-codes.numel() // BLOCK)


@functools.cache
def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError(
            "moment_bits=8: got no bitsandbytes, which stores 8-bit moments, expected 0.50 or newer. "
            "Run pip install 'bitsandbytes>=0.50', or use moment_bits=32."
        ) from error
    return functional


@functools.cache
def _codes(device: torch.device, signed: bool) -> Tensor:
    """[256] the dynamic map, ascending in [-1, 1] or [0, 1]; one copy per device, so that no step sends it."""
    code: Tensor = _functional().create_dynamic_map(signed=signed).to(device)
    return code


@functools.cache
def _middles(signed: bool) -> Tensor:
    """[255] the values that are as near to one code as to the next."""
    code = _codes(torch.device("cpu"), signed)
    return (code[1:] + code[:-1]) / 2
