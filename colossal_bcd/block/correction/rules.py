"""Rules of BREAD's corrections: what is subtracted from a weight outside of the active block.

Source: "Accelerating Block Coordinate Descent for LLM Finetuning via Landscape Correction", openreview zs6bRl05g8.
n: values of data on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from colossal_bcd.optim.math import heavy_ball_, lion_direction_
from colossal_bcd.optim.options import require, require_betas


class Correction(Protocol):
    """A rule that needs nothing but a weight's own gradient: one value of the update for each value of it.

    The weight becomes `weight - lr * sgd_lr_scaling * direction`.
    """

    @property
    def state(self) -> Mapping[str, torch.dtype]:
        """Name and storage dtype of each entry that has a value per value of the weight, zero at first."""

    def direction(self, grad: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """[n] what is subtracted per unit of step size; may be `grad` itself, which must not be written.

        Args:
            grad: [n] averaged gradient in float32 or float64.
            state: [n] entries in the same dtype, to be updated in place.
        """


@dataclass(frozen=True, kw_only=True)
class SgdCorrection:
    """The gradient itself (BREAD-SGD)."""

    @property
    def state(self) -> Mapping[str, torch.dtype]:
        return {}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return grad


@dataclass(frozen=True, kw_only=True)
class SignCorrection:
    """The gradient's sign (`sgd_use_sign`)."""

    @property
    def state(self) -> Mapping[str, torch.dtype]:
        return {}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return grad.sign()


@dataclass(frozen=True, kw_only=True)
class MomentumCorrection:
    """Heavy ball, m = momentum * m + g, in 2 bytes per parameter."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")

    @property
    def state(self) -> Mapping[str, torch.dtype]:
        return {"momentum_buffer": torch.bfloat16}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return heavy_ball_(state["momentum_buffer"], grad, momentum=self.momentum)


@dataclass(frozen=True, kw_only=True)
class LionCorrection:
    """Lion (arXiv 2302.06675, algorithm 2) without weight decay, in 2 bytes per parameter."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Share of the average in the update, and its decay."""

    def __post_init__(self) -> None:
        require_betas(self.betas)

    @property
    def state(self) -> Mapping[str, torch.dtype]:
        return {"exp_avg": torch.bfloat16}

    def direction(self, grad: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        share, decay_share = (1 - beta for beta in self.betas)
        return lion_direction_(state["exp_avg"], grad, share=share, decay_share=decay_share)
