"""Drawing of blocks by norms, written out as a loop on one process; imports nothing of the package."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def draw(norms: Sequence[float | None], floor: float, seed: int, start: int, epoch: int) -> list[int]:
    """As many blocks as there are norms, with replacement, by inversion of the distribution."""
    stop = start + len(norms)
    largest = max((norm for norm in norms if norm is not None), default=1.0)
    filled = [largest if norm is None else norm for norm in norms]
    shares = [(1 - floor) * norm / sum(filled) + floor / len(norms) for norm in filled]
    bounds = list(itertools.accumulate(shares))
    generator = random.Random(f"blocks {start}-{stop} of seed {seed}, epoch {epoch}, by importance")
    drawn = []
    for _ in norms:
        point = generator.random() * bounds[-1]
        drawn.append(start + sum(bound <= point for bound in bounds))
    return drawn


def train(
    model: nn.Module,
    blocks: Sequence[str],
    ranges: Sequence[tuple[int, int]],
    period: int,
    num_turns: int,
    micro_batches: Callable[[int], Sequence[Tensor]],
    make_optimizer: Callable[[list[Tensor]], Any],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    *,
    by: str,
    floor: float,
    seed: int,
) -> tuple[list[tuple[int, ...]], list[float | None]]:
    """Active blocks of every period, and the norms for the next one, of a float32 model."""
    params = [[p for name, p in model.named_parameters() if name.startswith(prefix)] for prefix in blocks]
    norms: list[float | None] = [None] * len(blocks)
    orders: list[list[int]] = [[] for _ in ranges]
    history = []
    for turn in range(num_turns):
        for index, (start, stop) in enumerate(ranges):
            epoch, position = divmod(turn, stop - start)
            if position == 0 and epoch == 0:
                orders[index] = list(range(start, stop))
                random.Random(f"blocks {start}-{stop} of seed {seed}, epoch 0").shuffle(orders[index])
            elif position == 0:
                if by == "weight":
                    norms[start:stop] = [_norm(params[i]) for i in range(start, stop)]
                orders[index] = draw(norms[start:stop], floor, seed, start, epoch)
        active = [order[turn % len(order)] for order in orders]
        history.append(tuple(active))
        for param in model.parameters():
            param.requires_grad_(any(param is one for i in active for one in params[i]))
        optimizer = make_optimizer([param for i in active for param in params[i]])
        squares = dict.fromkeys(active, 0.0)
        for step in range(turn * period, (turn + 1) * period):
            batches = micro_batches(step)
            for batch in batches:
                (loss_of(model, batch) / len(batches)).backward()
            for i in active:
                squares[i] += _norm([param.grad for param in params[i]]) ** 2
            optimizer.step()
            optimizer.zero_grad()
        if by == "gradient":
            for i in active:
                norms[i] = (squares[i] / period) ** 0.5
    if by == "weight" and all(num_turns % (stop - start) == 0 for start, stop in ranges):
        norms = [_norm(group) for group in params]
    return history, norms


def _norm(tensors: Sequence[Any]) -> float:
    return torch.cat([tensor.detach().double().view(-1) for tensor in tensors]).norm().item()
