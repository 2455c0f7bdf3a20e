"""A checkpoint in the middle of a block, and on from it on another number of ranks.

torchrun --nproc_per_node 2 examples/resume.py
torchrun --nproc_per_node 1 examples/resume.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import colossalai
import torch.distributed as dist
from colossalai.booster import Booster
from counting import batch, model

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.booster import CheckpointFolder, LowLevelZeroPlugin
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator

BATCH = 8


def main(folder: Path, steps: int = 25) -> list[float]:
    """Take `steps` steps more than the newest checkpoint in the folder, and write one; the losses of these steps."""
    network = model().bfloat16()
    optimizer = BlockOptimizer(
        AdamW(network.parameters(), lr=3e-3), network.named_parameters(), switch_block_every=10, include_lm_head=True
    )
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    boosted: Any
    engine: Any
    boosted, engine, *_ = booster.boost(network, optimizer)
    checkpoints = CheckpointFolder(folder, keep_last=2)
    resumed = checkpoints.load(booster, boosted, engine)
    begin = 0 if resumed is None else resumed.step
    losses = []
    for step in range(begin, begin + steps):
        tokens = batch(step, rows=BATCH).chunk(dist.get_world_size())[dist.get_rank()].to(boosted.module.device)
        loss = boosted(input_ids=tokens, labels=tokens).loss
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    checkpoints.save(booster, boosted, engine, step=begin + steps)
    return losses


if __name__ == "__main__":
    install_cpu_accelerator()  # where no GPU is
    colossalai.launch_from_torch(seed=0, verbose=False)
    main(Path("resume_output"))
    dist.destroy_process_group()
