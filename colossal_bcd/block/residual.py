"""What rounding cuts off a float32 master, in 8 or 16 bits per value.

A weight is its master rounded to bfloat16 or float16, so the master lies within half of the weight's last place.
Between two bfloat16 numbers there are 2^16 float32 steps, between two of float16 2^13, whatever their exponent: the
difference of the bit patterns, taken as integers, is the residual.  n: values of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.checks import require_choice

ResidualBits = Literal[8, 16]

CHUNK = 2**22
"""Values that are converted at once, so that temporaries do not grow with the parameter."""

_STORED = {8: torch.int8, 16: torch.int16}
_NEIGHBOURS = {torch.bfloat16: 16, torch.float16: 13}
"""Base-2 logarithm of how many float32 numbers there are per step of the dtype."""
_NORMAL = 2.0**-14
"""Below it the steps of float16 no longer get smaller."""
_BINADE = 2**23
"""Float32 numbers between two powers of two."""
_ZERO = {torch.bfloat16: 0, torch.float16: (127 - 15) * _BINADE}
"""Ordinal of zero; see `_ordinal`."""
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True, kw_only=True)
class ResidualOptions:
    """How residuals are held.

    Raises:
        ValueError: `bits` is neither 8 nor 16.
    """

    bits: ResidualBits = 16
    """16: masters of bfloat16 weights and of float16 weights from 2^-14 on come back bit for bit, but for those half
    way between two weights, which move by one float32 step.  8: to 2^-9 of a weight's last place, 2^-8 half way."""
    offload: bool = False
    """Keep them on the CPU, in pinned memory where the weights are on a CUDA device."""

    def __post_init__(self) -> None:
        require_choice("residual_bits", self.bits, tuple(_STORED))

    @classmethod
    def asked(cls, residual: str, bits: ResidualBits = 16, offload: bool = False) -> ResidualOptions | None:
        """What `residual`, `residual_bits` and `residual_offload` of a BlockOptimizer ask for; None: nothing is kept.

        Raises:
            ValueError: a value is unknown, or there is nothing that it would act on.
        """
        require_choice("residual", residual, ("drop", "keep"))
        require_choice("residual_offload", offload, (False, True))
        options = cls(bits=bits, offload=offload)
        if residual == "keep":
            return options
        if options != cls():
            raise ValueError(
                f"residual: got 'drop' with residual_bits={bits} and residual_offload={offload}, expected 'keep', as "
                "nothing else has residuals. Set residual='keep', or leave the others out."
            )
        return None


class Residuals:
    """Residuals of the masters that were given up, until their parameters get masters again.

    A residual counts from the weight as it is when the master is made anew: where a correction has moved the weight
    meanwhile, the master is that far, in the new weight's last places, from the new weight, and still rounds to it.
    Without options nothing is kept.

    Attributes:
        of: parameter -> int8 or int16 tensor of its master's shape.
    """

    def __init__(self, options: ResidualOptions | None) -> None:
        self._options = options
        self.of: dict[Parameter, Tensor] = {}

    def empty(self, param: Parameter, shape: tuple[int, ...]) -> Tensor:
        """Zeros, where the residual of a master of this shape is written."""
        assert self._options is not None
        on_cpu = self._options.offload
        device = torch.device("cpu") if on_cpu else param.device
        pinned = on_cpu and param.device.type == "cuda"
        return torch.zeros(shape, dtype=_STORED[self._options.bits], device=device, pin_memory=pinned)

    @torch.no_grad()
    def keep(self, param: Parameter, master: Tensor, weight: Tensor) -> None:
        """Take what rounding has cut off a master that is given up; nothing where it has the weight's dtype.

        The weight is what the master stands for of the parameter, in the parameter's dtype.
        """
        if self._options is None or master.dtype != torch.float32 or weight.dtype not in _NEIGHBOURS:
            return
        residual = self.empty(param, tuple(master.shape))
        flat, masters, weights = residual.view(-1), master.reshape(-1), weight.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            part = slice(start, start + CHUNK)
            flat[part] = _lost_bits(masters[part], weights[part].to(master.device), self._options.bits)
        self.of[param] = residual

    @torch.no_grad()
    def give_back(self, param: Parameter, master: Tensor) -> None:
        """Turn the weight's values in a new master into those of the last one, in place."""
        residual = self.of.pop(param, None)
        if residual is None:
            return
        flat, values = residual.view(-1), master.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            part = slice(start, start + CHUNK)
            values[part] = _put_back(values[part], flat[part].to(master.device), param.dtype)
        if values.data_ptr() != master.data_ptr():
            master.copy_(values.view(master.shape))


def _lost_bits(master: Tensor, weight: Tensor, bits: int) -> Tensor:
    """[n] residual; zero where the weight is not the rounded master, or no finite number."""
    rounded = (master.to(weight.dtype) == weight) & weight.isfinite()
    ordinal = _ordinal(master, weight.dtype)
    distance = ordinal - _ordinal(weight.float(), weight.dtype)
    # Below 2^-14 masters of float16 lie between ordinals: the side decides where that is half a unit.
    side = (master.abs() - _value(ordinal, weight.dtype)).sign_()
    # At most 2^15, which float32 holds; half a unit goes to the even neighbour.
    units = side.mul_(0.25).add_(distance).mul_(_per_unit(weight.dtype, bits)).round_()
    # Half way to the next weight and beyond would round to that one.
    limit = 2.0 ** (min(bits, _NEIGHBOURS[weight.dtype]) - 1) - 1
    signed = units.clamp_(-limit, limit).mul_(_sign(weight))
    return torch.where(rounded, signed, 0.0).to(_STORED[bits])


def _put_back(weight: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] float32 masters of weights of `dtype`, which are given in float32; the sign is the weight's."""
    distance = residual.to(torch.float32).div_(_per_unit(dtype, 8 * residual.itemsize)).mul_(_sign(weight))
    # A weight that became zero meanwhile has no neighbour nearer to zero.
    ordinal = _ordinal(weight, dtype).add_(distance.to(torch.int32)).clamp_(min=_ZERO[dtype])
    return torch.where(weight.isfinite(), _value(ordinal, dtype).copysign_(weight), weight)


def _sign(weight: Tensor) -> Tensor:
    """[n] 1 or -1, also of zeros."""
    return torch.ones_like(weight, dtype=torch.float32).copysign_(weight.float())


def _per_unit(dtype: torch.dtype, bits: int) -> float:
    """Units of the residual per float32 number."""
    return 2.0 ** min(bits - _NEIGHBOURS[dtype], 0)


def _ordinal(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] int32 number of the absolute value in an order with equally many numbers in each step of `dtype`."""
    ordinal = values.view(torch.int32).bitwise_and(_MAGNITUDE)
    if dtype == torch.bfloat16:
        return ordinal
    # Float32's own steps above 2^-14, moved down by one binade, go on to zero at the width that they have there.
    even = (values.abs() + _NORMAL).view(torch.int32).sub_(_BINADE)
    return torch.where(values.abs() < _NORMAL, even, ordinal)


def _value(ordinal: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] non-negative float32 numbers of these ordinals."""
    value = ordinal.view(torch.float32)
    if dtype == torch.bfloat16:
        return value
    even = ordinal.add(_BINADE).view(torch.float32) - _NORMAL
    return torch.where(value < _NORMAL, even, value)
