"""Hyper-parameters and rule of the parameter-ratio form.  k: values of a tensor that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from colossal_bcd.block.ratio.selection import MaskMode
from colossal_bcd.optim.base import State
from colossal_bcd.optim.functional import require, require_adam, update_moments_
from colossal_bcd.sharding import Layout


@dataclass(frozen=True, kw_only=True)
class RatioHyper:
    """Hyper-parameters of one param group."""

    lr: float = 1e-5
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment, before it is debiased."""
    weight_decay: float = 0.0
    """Decoupled, of the entries that train: they shrink by lr * weight_decay."""
    maximize: bool = False
    """Go up the gradient instead of down."""
    update_ratio: float = 0.1
    """Share of each tensor that trains at a time."""
    switch_every: int = 100
    """Optimizer steps until the next share trains."""
    mask_mode: MaskMode = "adjacent"
    """A share is "adjacent" entries in the order of memory, or entries "scatter"ed at random."""
    preserve_threshold: int = 100
    """Tensors of fewer values train whole, always."""
    seed: int = 0
    """Of scattered entries, with the parameter's name."""
    global_step: int = 0
    """Optimizer steps so far, which say what trains; counted here, so that checkpoints have it."""

    def __post_init__(self) -> None:
        require_adam(self.lr, self.betas, self.eps, self.weight_decay)
        require_ratio("update_ratio", self.update_ratio)
        require(self.switch_every >= 1, "switch_every", self.switch_every, "a positive number of steps")
        modes = ("adjacent", "scatter")
        require(self.mask_mode in modes, "mask_mode", self.mask_mode, '"adjacent" or "scatter"')
        require(self.preserve_threshold >= 0, "preserve_threshold", self.preserve_threshold, "a number of values")


def require_ratio(name: str, ratio: Any) -> None:
    """Refuse what is no share."""
    require(isinstance(ratio, (int, float)) and 0 <= ratio <= 1, name, ratio, "a number in [0, 1]")


@dataclass(frozen=True)
class KeyedLayout(Layout):
    """A layout that says of which parameter: masks depend on it."""

    key: int = -1

    @classmethod
    def of(cls, layout: Layout, key: int) -> KeyedLayout:
        return cls(shape=layout.shape, split=layout.split, slice=layout.slice, key=key)


def adam_on(values: Tensor, grad: Tensor, state: State, hyper: RatioHyper) -> Tensor:
    """[k] updated entries; `values`, the state and, with `maximize`, `grad` are written."""
    grad = grad.neg() if hyper.maximize else grad
    update_moments_(state["exp_avg"], state["exp_avg_sq"], grad, hyper.betas)
    direction = state["exp_avg_sq"].sqrt().add_(hyper.eps).reciprocal_().mul_(state["exp_avg"])
    beta1, beta2 = hyper.betas
    lr = hyper.lr * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
    return values.mul_(1 - hyper.lr * hyper.weight_decay).add_(direction, alpha=-lr)
