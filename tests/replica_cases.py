"""What ranks run in test_replicas.py: training on several processes without an engine, and the same on one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.testing import CollectiveCounter

STEPS, PERIOD = 7, 2
LR = 1e-2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(5, 7), nn.Linear(7, 5, bias=False), nn.LayerNorm(5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.down(self.up(hidden).tanh()))


class Net(nn.Module):
    """Embedding, three layers, head; a batch whose first token is 0 leaves out the middle layer."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 5)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.lm_head = nn.Linear(5, 11, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            if index != 1 or tokens[0, 0] != 0:
                hidden = layer(hidden)
        logits = self.lm_head(hidden)
        return {"loss": logits.square().mean(), "logits": logits}


def batch(step: int, part: int) -> Tensor:
    return torch.randint(1, 11, (2, 4), generator=torch.Generator().manual_seed(100 * step + part))


def wrap(model: nn.Module, base: Any = None, **options: Any) -> BlockOptimizer:
    base = AdamW(model.parameters(), lr=LR, weight_decay=0.1) if base is None else base
    options = {"switch_block_every": PERIOD, "switch_mode": "ascending", "verbose": 0, **options}
    return BlockOptimizer(base, list(model.named_parameters()), **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): param.detach().clone() for name, param in model.named_parameters()}


@contextlib.contextmanager
def quiet(model: nn.Module, active: bool) -> Iterator[None]:
    """`no_sync` of a wrapper that has it, where it is wanted."""
    with model.no_sync() if active and hasattr(model, "no_sync") else contextlib.nullcontext():
        yield


def whole(
    world: int, optimizer_options: dict[str, Any], *, accumulate: int = 1, clip: float | None = None, **options: Any
) -> dict[str, Tensor]:
    """Weights after a loop on one process over the batches of all ranks."""
    model = Net(**options)
    optimizer = wrap(model, **optimizer_options)
    for step in range(STEPS):
        total = sum(
            model(batch(step, rank * accumulate + micro))["loss"] / (world * accumulate)
            for rank in range(world)
            for micro in range(accumulate)
        )
        total.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def wrapped(kind: str, options: dict[str, Any], **net: Any) -> tuple[nn.Module, BlockOptimizer]:
    """A model as it is trained and its optimizer, made in the order that the kind says."""
    model = Net(**net)
    if kind == "plain":
        return model, wrap(model, **options)
    if kind == "ddp first":
        outer = DistributedDataParallel(model)
        prefixes = [f"module.{prefix}" for prefix in options.get("active_modules", ())]
        return outer, wrap(outer, **{**options, "active_modules": prefixes})
    if kind == "ddp unused":
        optimizer = wrap(model, **options)
        return DistributedDataParallel(model, find_unused_parameters=True), optimizer
    assert kind == "ddp"
    optimizer = wrap(model, **options)
    return DistributedDataParallel(model), optimizer


def train(
    kind: str,
    optimizer_options: dict[str, Any],
    *,
    accumulate: int = 1,
    clip: float | None = None,
    no_sync: bool = True,
    evaluate: bool = False,
    **net: Any,
) -> dict[str, Any]:
    """Weights of this rank, and collectives per step, of which the first checks the replicas."""
    model, optimizer = wrapped(kind, optimizer_options, **net)
    rank, calls = dist.get_rank(), []
    for step in range(STEPS):
        with CollectiveCounter() as counter:
            for micro in range(accumulate):
                with quiet(model, no_sync and micro < accumulate - 1):
                    (model(batch(step, rank * accumulate + micro))["loss"] / accumulate).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        calls.append(dict(counter.calls))
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(batch(99, 0))
            if rank == 0:
                model(batch(99, 1))
            model.train()
    return {"weights": weights(model), "calls": calls}


def many(cases: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[str, Any]:
    """Results of several calls of `train` in one start of ranks."""
    return {name: train(*args, **options) for name, (args, options) in cases.items()}
