"""The arithmetic of the rules, on flat tensors, each algorithm once.  n: values of data on this rank."""

from __future__ import annotations

from torch import Tensor

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch has fused kernels."""


def is_fusable(*tensors: Tensor) -> bool:
    """Whether a fused kernel of torch takes tensors: of one dtype, on one device that has such kernels."""
    first = tensors[0]
    alike = all(each.dtype == first.dtype and each.device == first.device for each in tensors)
    return alike and first.device.type in FUSED_DEVICES


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
    if step is None:
        return root.add_(eps).reciprocal_().mul_(exp_avg)
    root.div_((1 - beta2**step) ** 0.5)
    return root.add_(eps).reciprocal_().mul_(exp_avg).mul_(1 / (1 - beta1**step))


def debiased_rate(lr: float, step: int, betas: tuple[float, float]) -> float:
    """A step size that debiases both moments, where `eps` is added before that (arXiv 1412.6980, end of section 2)."""
    beta1, beta2 = betas
    return float(lr * ((1 - beta2**step) ** 0.5 / (1 - beta1**step)))


def heavy_ball_(buffer: Tensor, grad: Tensor, momentum: float, dampening: float = 0.0, first: bool = False) -> Tensor:
    """The momentum buffer, momentum * buffer + (1 - dampening) * gradient, in place; as torch's SGD computes it.

    Args:
        buffer: [n].
        grad: [n].
        momentum: decay of the buffer.
        dampening: part of the gradient that does not enter.
        first: whether this is the first update, whose buffer is the gradient itself.
    """
    return buffer.copy_(grad) if first else buffer.mul_(momentum).add_(grad, alpha=1 - dampening)


def lion_direction(exp_avg: Tensor, grad: Tensor, betas: tuple[float, float]) -> Tensor:
    """Lion's sign (arXiv 2302.06675, algorithm 2), in a new tensor; the average is updated in place.

    Args:
        exp_avg: [n] average.
        grad: [n].
        betas: share of the average in the sign, and its decay.
    """
    sign = exp_avg.lerp(grad, 1 - betas[0]).sign_()
    exp_avg.lerp_(grad, 1 - betas[1])
    return sign
