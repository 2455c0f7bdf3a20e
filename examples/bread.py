"""BREAD: the blocks that wait move, too, by a cheap correction within backward: `python examples/bread.py`."""

from __future__ import annotations

from counting import batch, model

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.block import LionCorrection


def main(steps: int = 60) -> list[float]:
    """Train on one process; the losses by step."""
    network = model()
    optimizer = BlockOptimizer(
        AdamW(network.parameters(), lr=3e-3),
        network.named_parameters(),
        switch_block_every=10,
        sgd_mode="all",  # "partial": only the layers above the active block, whose gradients backward makes anyway
        sgd_lr_scaling=0.1,
        correction=LionCorrection(),  # the paper's, without a state: leave it out
    )
    losses = []
    for step in range(steps):
        tokens = batch(step)
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0]
