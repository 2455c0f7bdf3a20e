"""Stochastic rounding of weights whose random bits belong to the value, not to the rank.

A value between two numbers of a low-precision dtype becomes the upper one with the probability of its distance from the
lower one, so its expectation is itself and updates far below the dtype's step survive on average (Gupta et al.,
arXiv 1502.02551, section 3; for bfloat16 weights Zamirai et al., arXiv 2010.06192).  The bits are a pure function of
the seed, the parameter's number, the step and the value's index in the global tensor: every mesh draws the same ones,
and replicas stay equal.  n: values of data on this rank.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from colossal_bcd.optim.options import RoundingOptions
from colossal_bcd.sharding import Layout

LOW_PRECISION = (torch.float16, torch.bfloat16)

CPU_CHUNK = 2**16
"""Values rounded at once: their int64 temporaries stay in a core's cache."""
DEVICE_CHUNK = 2**22
"""The same on accelerators, where the number of kernels counts."""


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def is_stochastic(hyper: object, dtype: torch.dtype) -> bool:
    """Whether parameters of `dtype` are rounded stochastically."""
    return isinstance(hyper, RoundingOptions) and hyper.rounding == "stochastic" and dtype in LOW_PRECISION


def stream(seed: int, key: int, step: int) -> int:
    """Number of the random stream of one parameter at one step: 64 bits, signed."""
    digest = hashlib.blake2b(repr((seed, key, step)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def random_bits(positions: Tensor, stream: int) -> Tensor:
    """[n] int64 with 64 random bits for each index of a stream, written into `positions`.

    Counter-based: the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014, figure 16).  Integer tensors wrap,
    so that CPU and accelerators draw the same bits.

    Args:
        positions: [n] int64, overwritten.
        stream: number that the function `stream` gives.
    """
    bits = positions.mul_(_GAMMA).add_(stream)
    for shift, factor in _MIX:
        # A right shift copies the sign; the mask makes it a logical one.
        bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return bits.bitwise_xor_(bits.bitwise_right_shift(31).bitwise_and_(2**33 - 1))


def stochastic_round(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] values of `dtype`, each one of the two that enclose the float32 value.

    What `dtype` can represent stays as it is; infinities, NaN and what lies beyond the largest finite number are
    converted as `Tensor.to` does.

    Args:
        values: [n] float32.
        bits: [n] int64, 24 random low bits each; more are ignored.
        dtype: bfloat16 or float16.
    """
    rounded = _to_bfloat16(values, bits) if dtype == torch.bfloat16 else _to_float16(values, bits)
    return torch.where(values.abs() <= torch.finfo(dtype).max, rounded.to(dtype), values.to(dtype))


def _to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Add 16 random bits below the last one of bfloat16 and cut there; a carry is the next number away from zero."""
    noise = bits.bitwise_and(0xFFFF).to(torch.int32)
    return noise.add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)


def _to_float16(values: Tensor, bits: Tensor) -> Tensor:
    """Float16's step grows with the value down to 2^-14 and is 2^-24 below, so it is computed."""
    exponent = values.view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF).clamp_(min=127 - 14)
    step = exponent.sub_(10).bitwise_left_shift_(23).view(torch.float32)
    steps = values.abs().div_(step)
    lower = steps.floor()
    uniform = bits.bitwise_and(0xFFFFFF).to(torch.float32).mul_(2**-24)
    upwards = uniform.lt(steps.sub_(lower))
    return lower.add_(upwards).mul_(step).copysign_(values)


def round_into(target: Tensor, values: Tensor, layout: Layout, stream: int) -> None:
    """Round this rank's data stochastically, in chunks, so that temporaries do not grow with the parameter.

    Args:
        target: [n] bfloat16 or float16, written.
        values: [n] float32.
        layout: of the parameter.
        stream: number that the function `stream` gives.
    """
    size = CPU_CHUNK if target.device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, len(target), size):
        stop = min(start + size, len(target))
        bits = random_bits(layout.positions(start, stop, target.device), stream)
        target[start:stop] = stochastic_round(values[start:stop], bits, target.dtype)
