"""What ranks run in test_block_agreement.py: each rank finds another checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from checkpoint_cases import Run

from colossal_bcd.booster import CheckpointFolder
from colossal_bcd.checkpoint.errors import CheckpointError


def different_checkpoints(path: str) -> list[str]:
    """Errors of this rank, which lacks the newest checkpoint if it is not the first."""
    run = Run("zero2 x2", "badam")
    for step, folders in ((1, ("all", "old")), (2, ("all",))):
        run.step(step)
        for folder in folders:
            CheckpointFolder(Path(path, folder)).save(run.booster, run.model, run.engine, step=step)
    weights = [param.detach().clone() for param in run.model.parameters()]
    here, step, other = ("all", 2, "all") if dist.get_rank() == 0 else ("old", 1, "none")
    boosted = run.booster, run.model, run.engine
    loads = (
        lambda: CheckpointFolder(Path(path, here)).load(*boosted),
        lambda: CheckpointFolder(Path(path, other)).load(*boosted),
        lambda: run.booster.load_optimizer(run.engine, f"{path}/{here}/step-{step:08}/optimizer"),
    )
    errors = []
    for load in loads:
        try:
            load()
        except CheckpointError as error:
            errors.append(str(error))
    assert run.engine.optim.num_steps == 2
    assert all((a == b).all() for a, b in zip(weights, run.model.parameters(), strict=True))
    return errors
