"""What ranks run in test_fsdp_plugin_checkpoints.py: from a plugin of ColossalAI's booster to FSDP2, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp_block_cases as cases
import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from fsdp_block_cases import Case
from fsdp_checkpoint_cases import SAVED, STEPS

from colossal_bcd.booster import LowLevelZeroPlugin


def boosted(case: Case, weights: Path | None = None) -> tuple[Any, Any, Booster]:
    model = case.build()
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    model, engine, *_ = booster.boost(model, case.wrap(model))
    return model, engine, booster


def train(model: Any, engine: Any, booster: Booster, first: int) -> list[float]:
    losses = []
    for step in range(first, first + STEPS):
        loss = models.loss(model, cases.batch(step, 0))
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    return losses


def save(folder: Path, named: dict[str, Case]) -> dict[str, list[float]]:
    """Losses after a checkpoint under ZeRO."""
    found = {}
    for name, case in named.items():
        model, engine, booster = boosted(case)
        train(model, engine, booster, 0)
        if dist.get_rank() == 0:
            (folder / name).mkdir()
            torch.save(
                {key: p.detach().clone() for key, p in model.unwrap().named_parameters()}, folder / name / "weights.pt"
            )
        booster.save_optimizer(engine, str(folder / name / "optimizer"), shard=True)
        found[name] = train(model, engine, booster, SAVED)
    return found


def load(folder: Path, named: dict[str, Case]) -> dict[str, list[float]]:
    """Losses under ZeRO of runs that FSDP2 has saved."""
    dist.barrier()
    found = {}
    for name, case in named.items():
        model, engine, booster = boosted(case, folder / name / "weights.pt")
        booster.load_optimizer(engine, str(folder / name / "optimizer"))
        found[name] = train(model, engine, booster, SAVED)
    return found
