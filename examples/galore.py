"""GaLore and GoLore: AdamW on gradients that are projected to a low rank: `python examples/galore.py`."""

from __future__ import annotations

from typing import Any

from counting import batch, model

from colossal_bcd import GoLoreAdamW, param_groups


def main(steps: int = 60) -> list[float]:
    """Train on one process; the losses by step."""
    network = model()
    # Matrices of the layers are projected; the embedding, the head and the norms are trained as by AdamW.
    groups = param_groups(network, rank=16, update_proj_gap=10, scale=1.0, target_modules=["self_attn", "mlp"])
    # Singular vectors at first, random bases after half of the steps, where noise would have chosen the vectors.
    optimizer = GoLoreAdamW(groups, lr=3e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        tokens = batch(step)
        loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    layers: Any = network.get_submodule("model.layers")
    state = optimizer.state[layers[0].self_attn.q_proj.weight]
    assert state["exp_avg"].numel() == 16 * 64, "moments of rank 16 instead of 64"
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0]
