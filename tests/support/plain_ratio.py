"""BAdam's parameter-ratio form as a plain loop over whole tensors, from its description; nothing of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def window(numel: int, ratio: float, epoch: int) -> Tensor:
    """Places that train: the next `int(numel * ratio)` in memory's order after those of the epochs before, around."""
    count = int(numel * ratio)
    return (epoch * count + torch.arange(count)) % numel


def ratio_adam(
    weight: Tensor,
    grad: Tensor,
    places: Tensor,
    state: dict[str, Any],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.0,
) -> None:
    """One step of Adam on some places of a contiguous tensor, in place."""
    grad = grad.reshape(-1)[places]
    state["t"] = state.get("t", 0) + 1
    state["m"] = betas[0] * state.get("m", torch.zeros_like(grad)) + (1 - betas[0]) * grad
    state["v"] = betas[1] * state.get("v", torch.zeros_like(grad)) + (1 - betas[1]) * grad**2
    step = lr * (1 - betas[1] ** state["t"]) ** 0.5 / (1 - betas[0] ** state["t"])
    flat = weight.view(-1)
    flat[places] = flat[places] * (1 - lr * decay) - step * state["m"] / (state["v"].sqrt() + eps)
