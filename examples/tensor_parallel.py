"""Blocks under ColossalAI's tensor parallelism and ZeRO: `torchrun --nproc_per_node 2 examples/tensor_parallel.py`.

The optimizer is the one of a single process; the booster shards it.  `colossalai run` does as well as torchrun.
"""

from __future__ import annotations

import os
from typing import Any

import colossalai
import torch.distributed as dist
from colossalai.booster import Booster
from counting import batch, model

from colossal_bcd import CAME, BlockOptimizer
from colossal_bcd.booster import HybridParallelPlugin
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator


def main(steps: int = 60, tp_size: int = 2) -> list[float]:
    """Train on all ranks, `tp_size` of which share a model; the losses by step."""
    network = model()
    optimizer = BlockOptimizer(
        CAME(network.parameters(), lr=1e-3), network.named_parameters(), switch_block_every=10, include_lm_head=True
    )
    plugin = HybridParallelPlugin(tp_size=tp_size, pp_size=1, zero_stage=2, precision="bf16", max_norm=1.0)
    booster = Booster(plugin=plugin)
    boosted: Any
    engine: Any
    boosted, engine, *_ = booster.boost(network, optimizer)
    losses = []
    for step in range(steps):
        tokens = batch(step, dist.get_rank(plugin.dp_group)).to(boosted.module.device)
        loss = boosted(input_ids=tokens, labels=tokens).loss
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    install_cpu_accelerator()  # where no GPU is
    colossalai.launch_from_torch(seed=0, verbose=False)
    losses = main(tp_size=min(2, int(os.environ["WORLD_SIZE"])))
    assert losses[-1] < losses[0]
    dist.destroy_process_group()
