"""The allocator's figures are the estimate's."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn

import colossal_bcd
from colossal_bcd import BlockOptimizer, estimate
from colossal_bcd.testing import PeakBytes, live_bytes

SCALARS = 512
"""Bytes of what is small: norms, their parts, and rows and columns of statistics of small matrices."""


def blocks(model: nn.Module) -> BlockOptimizer:
    base = colossal_bcd.AdamW(model.parameters(), lr=1e-3)
    return BlockOptimizer(base, list(model.named_parameters()), switch_mode="fixed", verbose=0)


def made(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: getattr(colossal_bcd, name)(model.parameters(), **options)


MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": made("AdamW", lr=1e-3),
    "Lion": made("Lion", lr=1e-3),
    "SGD": made("SGD", lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Lamb": made("Lamb", lr=1e-3),
    "CAME": made("CAME", lr=1e-3),
    "Adafactor": made("Adafactor", lr=1e-3, relative_step=False),
    "GaLoreAdamW": made("GaLoreAdamW", lr=1e-3, rank=4, update_proj_gap=100),
    "blocks": blocks,
}


class Meter:
    """Bytes that tensors on a device have asked for, before the allocator rounds them up."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            # The libraries' workspaces are tensors of the allocator, too, and stay.
            for dtype in (torch.float32, torch.bfloat16):
                batch = torch.ones(2, 64, 64, device=device, dtype=dtype)
                batch.baddbmm_(batch.clone(), batch.clone())
                batch[0].addmm_(batch[1] @ batch[1], batch[1])
            torch.linalg.svd(torch.ones(64, 64, device=device))

    def now(self) -> int:
        gc.collect()
        return self._requested("current") if self._device == "cuda" else live_bytes()

    def _requested(self, what: str) -> int:
        torch.cuda.synchronize()
        return int(torch.cuda.memory_stats()[f"requested_bytes.all.{what}"])

    def most_in(self, work: Callable[[], Any]) -> int:
        """Bytes that are alive at most while some work is done."""
        resting = self.now()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            return self._requested("peak")
        with PeakBytes() as alive:
            work()
        return resting + alive.peak


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("vocab", [256, 60_000], ids=["small tensors", "one large tensor"])
@pytest.mark.parametrize("name", MAKE)
def test_memory_is_what_the_estimate_says(name: str, vocab: int, device: str) -> None:
    """A tensor that is a stack of its own has temporaries, too; AdamW's and Lion's were not counted."""
    dtype = torch.bfloat16 if name == "blocks" else torch.float32
    model = models.llama(vocab=vocab).to(device, dtype)
    params, meter = list(model.parameters()), Meter(device)
    before = meter.now()
    optimizer = MAKE[name](model)
    guess = estimate(optimizer)
    for step in range(3):
        for param in params:
            param.grad = torch.ones_like(param) if param.requires_grad else None
        if step < 2:
            optimizer.step()
        else:
            peak = meter.most_in(optimizer.step)
        for param in params:
            param.grad = None
    # Tensors between steps: master, gradient and at most six of state; in a step as many again.
    # Sums of squares copy a sixteenth of the largest one to float64.
    largest = max(param.numel() for param in params)
    slack = 16 * SCALARS * len(params) + largest // 16 * 8
    if device == "cuda" and name in ("Adafactor", "CAME"):
        # CUDA sums long columns of narrow matrices in two passes; their partial sums are up to half of the matrix.
        slack += 2 * largest
    assert meter.now() - before == pytest.approx(guess.between_steps, abs=slack)
    # A working gradient is freed once its master has it, one after the other.
    assert peak - before <= guess.in_step + guess.gradients * (name == "blocks") + slack
    assert peak - before >= guess.between_steps + guess.step_gradients
