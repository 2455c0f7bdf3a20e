"""The arithmetic of the rules, on flat tensors, each algorithm once.  n: values of data on this rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colossal_bcd.sharding.lazy import Number, add_

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch has fused kernels."""


def is_fusable(weight: Tensor, grad: Tensor) -> bool:
    """Whether a fused kernel of torch takes two tensors: of one dtype, on one device that has such kernels."""
    device = weight.device
    return weight.dtype == grad.dtype and device == grad.device and device.type in FUSED_DEVICES


def moment_numbers(betas: tuple[float, float]) -> dict[str, Any]:
    """The numbers that `update_moments_` takes."""
    beta1, beta2 = betas
    return {"share1": 1 - beta1, "keep2": beta2, "share2": 1 - beta2}


def direction_numbers(betas: tuple[float, float], eps: float, step: int | None) -> dict[str, Any]:
    """The numbers that `moment_direction` takes.

    Debiased (arXiv 1412.6980, algorithm 1), the direction is (m / d1) / (sqrt(v / d2) + eps) with d = 1 - beta^step,
    which is m / (sqrt(v) * d1 / sqrt(d2) + eps * d1).

    Args:
        betas: decay of the moments.
        eps: added to the denominator.
        step: number of this update from 1, to debias both moments; None does not.
    """
    if step is None:
        return {"eps": eps}
    debias1, debias2 = (1 - beta**step for beta in betas)
    return {"root_scale": debias1 / debias2**0.5, "eps": eps * debias1}


def update_moments_(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *, share1: Number, keep2: Number, share2: Number
) -> None:
    """Exponential averages of the gradient and of its square, in place.

    Args:
        exp_avg: [n] first moment m.
        exp_avg_sq: [n] second moment v.
        grad: [n].
        share1: part of the gradient in m, 1 - beta1.
        keep2: part of v that stays, beta2.
        share2: part of the squared gradient in v, 1 - beta2.
    """
    exp_avg.lerp_(grad, share1)
    if isinstance(share2, Tensor):
        exp_avg_sq.mul_(keep2).addcmul_(grad * share2, grad)
    else:
        exp_avg_sq.mul_(keep2).addcmul_(grad, grad, value=share2)


def moment_direction(exp_avg: Tensor, exp_avg_sq: Tensor, *, eps: Number, root_scale: Number | None = None) -> Tensor:
    """m / (sqrt(v) * root_scale + eps), in a new tensor.

    Args:
        exp_avg: [n] first moment m.
        exp_avg_sq: [n] second moment v.
        eps: added to the denominator.
        root_scale: factor of the root; None: 1.
    """
    root = exp_avg_sq.sqrt()
    if root_scale is not None:
        root.mul_(root_scale)
    return torch.div(exp_avg, root.add_(eps), out=root)


def adam_direction_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    share1: Number,
    keep2: Number,
    share2: Number,
    **numbers: Number,
) -> Tensor:
    """`moment_direction` after `update_moments_`."""
    update_moments_(exp_avg, exp_avg_sq, grad, share1=share1, keep2=keep2, share2=share2)
    return moment_direction(exp_avg, exp_avg_sq, **numbers)


def debiased_rate(lr: float, step: int, betas: tuple[float, float]) -> float:
    """A step size that debiases both moments, where `eps` is added before that (arXiv 1412.6980, end of section 2)."""
    beta1, beta2 = betas
    return float(lr * ((1 - beta2**step) ** 0.5 / (1 - beta1**step)))


def heavy_ball_(buffer: Tensor, grad: Tensor, *, momentum: Number, share: Number = 1.0) -> Tensor:
    """The momentum buffer, momentum * buffer + share * gradient, in place; as torch's SGD computes it.

    Args:
        buffer: [n].
        grad: [n].
        momentum: decay of the buffer.
        share: part of the gradient that enters.
    """
    return add_(grad, buffer.mul_(momentum), scale=share)


def nesterov(buffer: Tensor, grad: Tensor, *, momentum: Number) -> Tensor:
    """Gradient + momentum * buffer, in a new tensor."""
    return add_(buffer, grad.clone(), scale=momentum)


def nesterov_(buffer: Tensor, grad: Tensor, *, momentum: Number) -> Tensor:
    """`nesterov`, after the buffer was updated as by `heavy_ball_`."""
    return nesterov(heavy_ball_(buffer, grad, momentum=momentum), grad, momentum=momentum)


def lion_direction_(exp_avg: Tensor, grad: Tensor, *, share: Number, decay_share: Number) -> Tensor:
    """Lion's sign (arXiv 2302.06675, algorithm 2), in a new tensor; the average is updated in place.

    Args:
        exp_avg: [n] average.
        grad: [n].
        share: part of the gradient in the sign, 1 - beta1.
        decay_share: part of the gradient in the average, 1 - beta2.
    """
    sign = exp_avg.lerp(grad, share).sign_()
    exp_avg.lerp_(grad, decay_share)
    return sign


def capped_(x: Tensor) -> Tensor:
    """Second moments, at most half of the largest number of their dtype, in place; what is not a number stays so.

    Squares of float32 gradients above 1.8e19 are infinite, and what divides by a mean of them is no number.  Capped,
    they have the sign and the order of size of what float64 gives, and clipping bounds the update as there.
    """
    return x.clamp_(max=torch.finfo(x.dtype).max / 2)
