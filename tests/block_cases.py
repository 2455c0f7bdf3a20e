"""What ranks run in test_block_plugins.py: block coordinate descent under the real plugins."""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from torch import nn

from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin

PLUGINS = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin, "ddp": TorchDDPPlugin}
PERIOD = 3
LAYERS = 3


def build(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    model = models.gpt2(layers=LAYERS) if kind == "gpt2" else models.llama(layers=LAYERS, **options)
    return model.to(dtype)


def base_optimizer(name: str, params: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.5, momentum=0.9)
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)


def boosted(
    plugin: str,
    options: dict[str, Any],
    *,
    base: str = "adamw",
    model: nn.Module | None = None,
    block: dict[str, Any] | None = None,
) -> tuple[Any, Any, Booster]:
    """Model, engine and booster (which must be kept alive) of a block-trained Llama."""
    model = build() if model is None else model
    wrapped = BlockOptimizer(
        base_optimizer=base_optimizer(base, model.parameters()),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=PERIOD,
        **{"switch_mode": "ascending", "verbose": 0, **(block or {})},
    )
    booster = Booster(plugin=PLUGINS[plugin](**options))
    model, engine, *_ = booster.boost(model, wrapped)
    return model, engine, booster


def batch_of(step: int, rank: int, different: bool) -> torch.Tensor:
    return models.tokens(100 * step + (rank if different else 0))


def losses(
    plugin: str, options: dict[str, Any], steps: int, different: bool, base: str = "adamw", **kwargs: Any
) -> dict[str, Any]:
    """Losses of this rank's batches, its data-parallel rank, and the active blocks by step."""
    dtype = torch.float32 if options.get("precision") == "fp32" else torch.bfloat16
    model, engine, booster = boosted(plugin, options, base=base, model=build(dtype=dtype), **kwargs)
    group = getattr(booster.plugin, "dp_group", dist.group.WORLD)
    rank = dist.get_rank(group)
    seen, active = [], []
    for step in range(steps):
        active.append(engine.optim.active_names()[0])
        batch = batch_of(step, rank, different)
        loss = model(input_ids=batch, labels=batch).loss
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        seen.append(loss.item())
    return {"losses": seen, "rank": rank, "active": active}
