"""Blocks on sharded weights under the booster: `torchrun --nproc_per_node 2 examples/fsdp_booster.py`.

As under the other plugins, but each rank has its rows of the weights only: (2M + 16b)/N bytes for M values, b of them
in a block, on N ranks.  `colossalai run` does as well as torchrun.
"""

from __future__ import annotations

import logging
from typing import Any

import colossalai
import torch.distributed as dist
from colossalai.booster import Booster
from counting import batch, model

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.booster import FSDP2Plugin, estimate
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator


def main(steps: int = 60) -> list[float]:
    """Train on every rank's own batches; the losses of this rank by step."""
    network = model()
    optimizer = BlockOptimizer(
        AdamW(network.parameters(), lr=3e-3),
        network.named_parameters(),
        switch_block_every=10,
        include_embedding=True,
        include_lm_head=True,
    )
    booster = Booster(plugin=FSDP2Plugin(precision="bf16", max_norm=1.0))
    boosted: Any
    engine: Any
    boosted, engine, *_ = booster.boost(network, optimizer)
    logging.info("%s", estimate(engine))
    losses = []
    for step in range(steps):
        tokens = batch(step, dist.get_rank()).to(boosted.device)
        loss = boosted(input_ids=tokens, labels=tokens).loss
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    install_cpu_accelerator()  # where no GPU is
    colossalai.launch_from_torch(seed=0, verbose=False)
    losses = main()
    assert losses[-1] < losses[0]
    dist.destroy_process_group()
