"""Blocks on sharded weights, by torch alone: `torchrun --nproc_per_node 2 examples/fsdp.py`.

Each rank has a half of the weights, and masters and moments of a half of the block that trains.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from counting import batch, model

from colossal_bcd import AdamW, BlockOptimizer, fsdp


def main(steps: int = 60, switch_every: int = 10) -> list[float]:
    """Train on every rank's own batches; the losses of this rank by step."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    network = fsdp.shard(model().to(device, torch.bfloat16))
    optimizer = BlockOptimizer(
        AdamW(network.parameters(), lr=3e-3),
        network.named_parameters(),
        switch_block_every=switch_every,
        include_embedding=True,
        include_lm_head=True,
        verbose=1,  # a line for every switch, in the log
    )
    fsdp.attach(network, optimizer, max_norm=1.0)
    losses = []
    for step in range(steps):
        tokens = batch(step, dist.get_rank()).to(device)
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    losses = main()
    assert losses[-1] < losses[0]
    dist.destroy_process_group()
