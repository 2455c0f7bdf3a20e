"""What ranks run in test_block_log.py: a pipeline of two stages that leaves logging alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import block_cases
import models
import torch.distributed as dist

OPTIONS = {"tp_size": 1, "pp_size": 2, "zero_stage": 1, "precision": "fp32", "num_microbatches": 2}


def train(block: dict[str, Any]) -> None:
    """Two steps with a switch after each."""
    model, engine, booster = block_cases.boosted(
        "hybrid", OPTIONS, base="sgd", model=models.llama(layers=4), block={"switch_block_every": 1, **block}
    )
    for step in range(2):
        batch = models.tokens(step)
        data = iter([{"input_ids": batch, "labels": batch}])
        booster.execute_pipeline(data, model, lambda out, _: out.loss, engine, return_loss=True)
        engine.step()
        engine.zero_grad()


def show(path: str) -> None:
    """Add what this rank shows to a file, as a launcher shows it of all ranks."""
    with Path(path).open("a") as file:
        os.dup2(file.fileno(), 2)
    for name, block in {
        "per stage": {"verbose": 1},
        "one block": {"verbose": 1, "block_ranges": [(0, 4)]},
        "silent": {"verbose": 0},
    }.items():
        dist.barrier()
        if dist.get_rank() == 0:
            sys.stderr.write(f"-- {name}\n")
            sys.stderr.flush()
        dist.barrier()
        train(block)
