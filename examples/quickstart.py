"""Optimizers of this package are torch optimizers: `python examples/quickstart.py`.  ColossalAI is not needed."""

from __future__ import annotations

import torch
from torch import nn

from colossal_bcd import Adafactor


def main(steps: int = 100) -> list[float]:
    """Fit a small network to a smooth function; the losses by step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))
    # Second moments as one row and one column of each matrix; with `lr` given, the schedule is torch's business.
    optimizer = Adafactor(model.parameters(), lr=3e-2, relative_step=False)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        points = 2 * torch.rand(64, 2) - 1
        loss = (model(points) - points.prod(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0]
