"""Optimizers and meshes of test_memory.py, and what its ranks run."""

from __future__ import annotations

from typing import Any

import block_cases
import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster

import colossal_bcd
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, estimate
from colossal_bcd.testing import PeakBytes, live_bytes

MAKE: dict[str, Any] = {
    "torch AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "torch SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda model: colossal_bcd.AdamW(model.parameters(), lr=1e-3),
    "8-bit AdamW": lambda model: colossal_bcd.AdamW(model.parameters(), lr=1e-3, moment_bits=8),
    "Adafactor": lambda model: colossal_bcd.Adafactor(model.parameters(), beta1=0.9),
    "CAME": lambda model: colossal_bcd.CAME(model.parameters(), lr=1e-3),
    "GaLoreAdamW": lambda model: colossal_bcd.GaLoreAdamW(model.parameters(), lr=1e-3, rank=2),
}

HYBRID = {"tp_size": 2, "pp_size": 1, "precision": "bf16"}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero2, CAME": (2, "CAME", {"stage": 2, "precision": "bf16"}),
    "zero2, 8-bit AdamW": (2, "8-bit AdamW", {"stage": 2, "precision": "bf16"}),
    "tp2, Adafactor": (2, "Adafactor", {**HYBRID, "zero_stage": 0}),
    "tp2+zero2, blocks": (4, "blocks", {**HYBRID, "zero_stage": 2}),
}


def held(case: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of masters, of all beyond the weights between steps, at most in a step; and the estimate of them."""
    _, name, options = CASES[case]
    model: Any = block_cases.build()
    optimizer = block_cases.wrap(model, "came", {"switch_block_every": 3}) if name == "blocks" else MAKE[name](model)
    booster = Booster(plugin=(LowLevelZeroPlugin if "stage" in options else HybridParallelPlugin)(**options))
    engine: Any
    model, engine, *_ = booster.boost(model, optimizer)
    masters = sum(master.nbytes for param, master in engine.masters.of.items() if master.data_ptr() != param.data_ptr())
    # Weights, and ColossalAI's random states of every dropout.
    before = live_bytes() - masters
    peaks = []
    for _ in range(2):
        booster.backward(models.loss(model, models.tokens(dist.get_rank())), engine)
        with PeakBytes() as alive:
            resting = live_bytes()
            engine.step()
        engine.zero_grad()
        peaks.append(resting + alive.peak)
    guess = estimate(engine)
    said = {name: getattr(guess, name) for name in ("masters", "between_steps", "in_step")}
    return {"masters": masters, "between_steps": live_bytes() - before, "in_step": peaks[-1] - before}, said
