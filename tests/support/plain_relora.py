"""GoLore's ReLoRA form as a plain loop over whole matrices, from its description; nothing of the package.

W_eff = W - s A B.  At a refresh: W becomes W_eff, one side a new basis, the first moment is carried over, the trained
side becomes 0 and its gradient -s G B^T (or -s A^T G); between refreshes the chain rule says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor, dict[str, Any]], None]


def adamw(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    lr: float = 1e-2,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    decay: float = 0.1,
) -> None:
    state["t"] = state.get("t", 0) + 1
    state["first"] = beta1 * state.get("first", torch.zeros_like(weight)) + (1 - beta1) * grad
    state["second"] = beta2 * state.get("second", torch.zeros_like(weight)) + (1 - beta2) * grad**2
    first = state["first"] / (1 - beta1 ** state["t"])
    second = state["second"] / (1 - beta2 ** state["t"])
    weight -= lr * decay * weight
    weight -= lr * first / (second.sqrt() + eps)


def sgd(
    weight: Tensor, grad: Tensor, state: dict[str, Any], lr: float = 1e-2, momentum: float = 0.9, decay: float = 0.1
) -> None:
    grad = grad + decay * weight
    state["first"] = momentum * state["first"] + grad if "first" in state else grad
    weight -= lr * state["first"]


class PlainReLoRA:
    """One matrix."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        self.weight, self.rank, self.scale = weight.clone(), rank, scale
        rows, columns = weight.shape
        self.right = rows >= columns
        self.left_side = torch.zeros(rows, rank, dtype=weight.dtype)
        self.right_side = torch.zeros(rank, columns, dtype=weight.dtype)
        self.state: dict[str, Any] = {}

    @property
    def effective(self) -> Tensor:
        return self.weight - self.scale * self.left_side @ self.right_side

    def refresh(self, full: Tensor, basis: Tensor | None) -> None:
        """A given basis ([rank, columns] or [rows, rank]), or leading singular vectors."""
        self.weight = self.effective
        u, _, vh = torch.linalg.svd(full, full_matrices=False)
        first = self.state.get("first")
        if self.right:
            new = vh[: self.rank] if basis is None else basis
            if first is not None:
                self.state["first"] = (first @ self.right_side) @ new.T
            self.right_side, self.left_side = new, torch.zeros_like(self.left_side)
        else:
            new = u[:, : self.rank] if basis is None else basis
            if first is not None:
                self.state["first"] = new.T @ (self.left_side @ first)
            self.left_side, self.right_side = new, torch.zeros_like(self.right_side)

    def step(self, full: Tensor, update: Update) -> None:
        if self.right:
            update(self.left_side, -self.scale * full @ self.right_side.T, self.state)
        else:
            update(self.right_side, -self.scale * self.left_side.T @ full, self.state)
