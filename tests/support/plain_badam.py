"""Block coordinate descent written out as a loop on one process; imports nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def train(
    model: nn.Module,
    blocks: Sequence[str],
    order: Sequence[int | Sequence[int]],
    period: int,
    micro_batches: Callable[[int], Sequence[Tensor]],
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    max_norm: float = 0.0,
    accumulate: int = 1,
) -> list[list[float]]:
    """Train one block after another and return the losses of each step's micro-batches.

    Args:
        model: in the precision to train in.
        blocks: name prefix of each block.
        order: block (or blocks trained together) of each period.
        period: steps per block.
        micro_batches: token ids of each micro-batch by step; their gradients are taken apart, divided, then added.
        make_optimizer: a fresh optimizer on the masters of a block.
        loss_of: scalar loss of a micro-batch.
        max_norm: clip the norm of the block's gradient, 0 does not.
        accumulate: micro-batches of one rank; theirs add up before the ranks' gradients are divided and added.
    """
    losses: list[list[float]] = []
    for turn in order:
        chosen = [blocks[i] for i in ([turn] if isinstance(turn, int) else turn)]
        active = [p for name, p in model.named_parameters() if any(name.startswith(prefix) for prefix in chosen)]
        for param in model.parameters():
            param.requires_grad_(any(param is one for one in active))
        masters = [p.detach().clone().float() if p.dtype != torch.float64 else p.detach().clone() for p in active]
        optimizer = make_optimizer(masters)
        for _ in range(period):
            batches = micro_batches(len(losses))
            sums: list[Tensor | None] = [None] * len(active)
            seen = []
            for first in range(0, len(batches), accumulate):
                for batch in batches[first : first + accumulate]:
                    loss = loss_of(model, batch)
                    (loss / accumulate).backward()
                    seen.append(loss.item())
                for i, param in enumerate(active):
                    assert param.grad is not None
                    part = param.grad / (len(batches) // accumulate)
                    sums[i] = part if sums[i] is None else sums[i] + part
                    param.grad = None
            losses.append(seen)
            _step(optimizer, active, masters, sums, max_norm)
    return losses


@torch.no_grad()
def _step(optimizer: Any, active: Any, masters: Any, sums: Any, max_norm: float) -> None:
    for master, total in zip(masters, sums, strict=True):
        master.grad = total.to(master.dtype)
    if max_norm:
        norm = torch.stack([master.grad.square().sum() for master in masters]).sum().sqrt()
        for master in masters:
            master.grad *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
    optimizer.step()
    for param, master in zip(active, masters, strict=True):
        param.copy_(master)
