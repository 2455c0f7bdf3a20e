"""8-bit storage of moments (Dettmers et al., arXiv 2110.02861, section 2): a matter of storage, not of math.

Chunks of 256 values of this rank's data share a float32 scale, their largest magnitude; a value is kept as the number
of the nearest one of 256 codes of bitsandbytes' dynamic map, signed or, for second moments, unsigned.  Chunks begin
where the rank's slice begins, so runs on different meshes differ within the quantisation error.  n: values of data on
this rank.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from colossal_bcd.optim.options import Bits
from colossal_bcd.optim.state.spec import CHUNK
from colossal_bcd.sharding.regions import Region

SMALL = 2**-10
"""Values below this part of their scale are settled without the library's CPU kernel, which is coarse there."""
ULPS = (0, 1, -1, 2, -2)
"""Distances, in units of the last place, at which `restore_into` looks for a chunk's scale."""


def require_library() -> None:
    """Raise ImportError where 8-bit moments cannot be computed, because bitsandbytes is missing."""
    _codes(torch.device("cpu"), True)


def refuse_stored(name: str, entry: Tensor, bits: Bits) -> NoReturn:
    """Refuse state that is stored in other bits than the hyper-parameter says."""
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
        codes.view(-1), absmax=absmax[: _num_chunks(codes)], code=_codes(codes.device, signed), blocksize=CHUNK
    )
    return values.view(codes.shape)


def quantize_into(codes: Tensor, absmax: Tensor, values: Tensor, signed: bool = True) -> None:
    """Store values, in place.

    A value that is not finite makes its whole chunk not finite: none disappears.  Of unsigned state, a value that is
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
    quantized, _ = _functional().quantize_blockwise(values, code=_codes(values.device, signed), blocksize=CHUNK)
    codes.copy_(quantized)
    # The library's own scales pass over NaN, which it then stores as a number.
    whole = len(values) // CHUNK
    body, tail = values[: whole * CHUNK].view(whole, CHUNK), values[whole * CHUNK :]
    torch.linalg.vector_norm(body, torch.inf, dim=1, out=absmax[:whole])
    if len(tail):
        absmax[whole] = torch.linalg.vector_norm(tail, torch.inf)
    if values.device.type == "cpu":
        _settle_small_values(codes, absmax[: _num_chunks(codes)], values, signed)
    if not signed:
        codes.masked_fill_((codes == 0) & (values > 0), 1)


def _settle_small_values(codes: Tensor, absmax: Tensor, values: Tensor, signed: bool) -> None:
    """Give small values their nearest codes.

    The library's CPU kernel tells apart no less than 2^-16 of the scale and stores zero as 2.1e-5 of it.  Divided by
    the root of a second moment that is zero, too, that would move weights that have no gradient.
    """
    scale = torch.where(absmax > 0, absmax, 1).view(-1, 1).expand(-1, CHUNK).reshape(-1)[: len(values)]
    relative = values / scale
    small = relative.abs() < SMALL
    codes[small] = torch.bucketize(relative[small], _middles(signed)).to(torch.uint8)


def _num_chunks(codes: Tensor) -> int:
    return -(-codes.numel() // CHUNK)


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


def restore_region(region: Region, codes: Tensor, absmax: Tensor, values: Tensor, signed: bool = True) -> None:
    """Store the data of a rank's tensor in allocated codes and scales, whose chunks follow its order in memory.

    Args:
        region: of the tensor; its order of values may be another.
        codes: as the rank stores them, in their shape.
        absmax: their scales.
        values: [n] in the region's order.
        signed: which of the two maps.
    """
    floats = torch.zeros(codes.shape, device=codes.device)
    region.write(floats, values)
    restore_into(codes.view(-1)[: len(values)], absmax, floats.view(-1)[: len(values)], signed)


def restore_into(codes: Tensor, absmax: Tensor, values: Tensor, signed: bool = True) -> None:
    """Store values, in place, so that what was stored in the same chunks before is stored again bit for bit.

    The largest magnitude of a chunk is its scale where it is positive.  Else it is the scale times the lowest code,
    which is not -1, so that storing it as usual would shrink the whole chunk; of the few scales that give it, one that
    gives every value of the chunk exactly is taken.  Chunks that no scale gives are quantised as usual.

    Args:
        codes: [n] uint8, written.
        absmax: [at least ceil(n / 256)] float32, written.
        values: [n] float32.
        signed: which of the two maps; the largest value of an unsigned chunk is always its scale.
    """
    if not len(values):
        return
    quantize_into(codes, absmax, values, signed)
    if not signed:
        return
    lowest = dequantize(codes.new_zeros(1), absmax.new_ones(1)).abs()
    num_chunks = -(-len(values) // CHUNK)
    usual = absmax[:num_chunks].clone()
    settled = _exact(codes, absmax, values)
    for ulps in ULPS:
        if bool(settled.all()):
            return
        scale = usual / lowest
        for _ in range(abs(ulps)):
            scale = torch.nextafter(scale, torch.full_like(scale, torch.inf if ulps > 0 else 0.0))
        tried = _nearest(values, scale)
        good = _exact(tried, scale, values) & ~settled
        absmax[:num_chunks] = torch.where(good, scale, absmax[:num_chunks])
        codes.copy_(torch.where(_spread(good, len(values)), tried, codes))
        settled |= good


def _nearest(values: Tensor, scale: Tensor) -> Tensor:
    """[n] the nearest code of every value, by scales of the chunks."""
    table = dequantize(torch.arange(256, dtype=torch.uint8, device=values.device), scale.new_ones(1))
    relative = values / _spread(torch.where(scale > 0, scale, 1), len(values))
    return torch.bucketize(relative, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _exact(codes: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """Whether what is stored is the values, by chunk."""
    wrong = dequantize(codes, absmax) != values
    pad = -len(values) % CHUNK
    return ~torch.nn.functional.pad(wrong, (0, pad)).view(-1, CHUNK).any(1)


def _spread(of_chunks: Tensor, length: int) -> Tensor:
    """[length] the value of each value's chunk."""
    return of_chunks.view(-1, 1).expand(-1, CHUNK).reshape(-1)[:length]
