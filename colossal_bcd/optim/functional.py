"""Pure helpers that several rules share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def plain_number(value: Any) -> Any:
    """A hyper-parameter as rules read it: the value of a tensor of one value, such as a learning rate, and of a tuple.

    A tensor on an accelerator is waited for.
    """
    if isinstance(value, tuple):
        return tuple(map(plain_number, value))
    return value.item() if isinstance(value, Tensor) else value


def require(condition: bool, name: str, got: Any, expected: str) -> None:
    """Refuse a hyper-parameter.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(f"hyper-parameter {name}: got {got!r}, expected {expected}")


def require_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Refuse what no member of Adam's family can use."""
    require(lr >= 0, "lr", lr, "a non-negative number")
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers in [0, 1)")
    require(eps >= 0, "eps", eps, "a non-negative number")
    require(weight_decay >= 0, "weight_decay", weight_decay, "a non-negative number")


def update_moments_(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, betas: tuple[float, float]) -> None:
    """Exponential averages of the gradient and of its square, in place; all [n]."""
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def adam_direction(
    exp_avg: Tensor, exp_avg_sq: Tensor, step: int | None, betas: tuple[float, float], eps: float
) -> Tensor:
    """m / (sqrt(v) + eps), in a new tensor.

    Args:
        exp_avg: [n] first moment m.
        exp_avg_sq: [n] second moment v.
        step: number of this update from 1, to debias both moments (arXiv 1412.6980, algorithm 1); None does not.
        betas: decay of m and of v.
        eps: added to the denominator.
    """
    beta1, beta2 = betas
    root = exp_avg_sq.sqrt()
    scale = 1.0
    if step is not None:
        root.div_((1 - beta2**step) ** 0.5)
        scale = 1 / (1 - beta1**step)
    return root.add_(eps).reciprocal_().mul_(exp_avg).mul_(scale)
