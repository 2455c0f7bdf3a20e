"""BAdam: AdamW on one block of layers at a time, the next block after some steps: `python examples/badam.py`."""

from __future__ import annotations

from counting import batch, model

from colossal_bcd import AdamW, BlockOptimizer


def main(steps: int = 60, switch_every: int = 10) -> list[float]:
    """Train on one process; the losses by step."""
    network = model()
    optimizer = BlockOptimizer(
        AdamW(network.parameters(), lr=3e-3),
        network.named_parameters(),
        switch_block_every=switch_every,
        switch_mode="random",
        include_embedding=True,
        include_lm_head=True,
        seed=0,
        verbose=1,  # a line for every switch, in the log
    )
    losses = []
    for step in range(steps):
        tokens = batch(step)
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Gradients, float32 masters and moments exist for the block that trains now.
    assert {name for name, param in network.named_parameters() if param.requires_grad} < {
        name for name, _ in network.named_parameters()
    }
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0]
