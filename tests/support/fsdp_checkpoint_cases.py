"""What ranks run in test_fsdp_checkpoints.py: runs that are saved in the middle of a block, and go on elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp_block_cases as cases
import models
import torch
import torch.distributed as dist
from fsdp_block_cases import Case, whole
from torch import nn

from colossal_bcd.fsdp.checkpoint import load_optimizer, save_optimizer

SAVED, STEPS = 5, 5
"""Steps before and after a checkpoint: the third block has had one of its two steps."""


def train(case: Case, model: nn.Module, optimizer: Any, first: int) -> list[float]:
    """Steps on the same batch on every rank, so that all meshes train alike; the losses."""
    losses = []
    for step in range(first, first + STEPS):
        loss = models.loss(model, cases.batch(step, 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def result(case: Case, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    losses = train(case, model, optimizer, SAVED)
    return {"losses": losses, "weights": [whole(param) for param in model.parameters()]}


def save(folder: Path, named: dict[str, Case]) -> dict[str, Any]:
    """Train, save, and go on."""
    found = {}
    for name, case in named.items():
        model, optimizer, engine = case.attached()
        train(case, model, optimizer, 0)
        weights = {key: whole(param) for key, param in model.named_parameters()}
        if dist.get_rank() == 0:
            (folder / name).mkdir()
            torch.save(weights, folder / name / "weights.pt")
        save_optimizer(engine, folder / name / "optimizer")
        found[name] = result(case, model, optimizer)
    return found


def load(folder: Path, named: dict[str, Case]) -> dict[str, Any]:
    """Go on with what was saved."""
    dist.barrier()
    found = {}
    for name, case in named.items():
        model = case.build()
        model.load_state_dict(torch.load(folder / name / "weights.pt", weights_only=True), strict=False)
        case.sharded(model)
        optimizer = case.wrap(model)
        engine = cases.fsdp.attach(model, optimizer, max_norm=case.max_norm)
        load_optimizer(engine, folder / name / "optimizer")
        assert optimizer.num_steps == SAVED
        found[name] = result(case, model, optimizer)
    return found
