"""What ranks run in test_block_plugins.py: block coordinate descent under the real plugins."""

from __future__ import annotations

import contextlib
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from torch import nn

from colossal_bcd import CAME, Adafactor, BlockOptimizer, Lamb
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin

PLUGINS = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin, "ddp": TorchDDPPlugin}
PERIOD = 2
LAYERS = 3


def build(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    model = models.gpt2(layers=LAYERS).transformer if kind == "gpt2" else models.llama(layers=LAYERS, **options)
    return model.to(dtype)


def base_optimizer(name: str, params: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)
    if name == "lamb":
        return Lamb(params, lr=1e-3, weight_decay=0.1)
    if name == "adafactor":
        return Adafactor(params, beta1=0.9, weight_decay=0.1)
    if name == "came":
        return CAME(params, lr=1e-3, weight_decay=0.1)
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)


def wrap(model: nn.Module, base: str = "adamw", block: dict[str, Any] | None = None) -> BlockOptimizer:
    return BlockOptimizer(
        base_optimizer=base_optimizer(base, model.parameters()),
        named_parameters_list=list(model.named_parameters()),
        **{"switch_block_every": PERIOD, "switch_mode": "ascending", "verbose": 0, **(block or {})},
    )


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
    wrapped = wrap(model, base, block)
    booster = Booster(plugin=PLUGINS[plugin](**options))
    model, engine, *_ = booster.boost(model, wrapped)
    return model, engine, booster


def batch_of(step: int, rank: int, different: bool) -> torch.Tensor:
    return models.tokens(100 * step + (rank if different else 0))


def losses(
    plugin: str,
    options: dict[str, Any],
    steps: int,
    different: bool,
    base: str = "adamw",
    *,
    accumulate: int = 1,
    no_sync: bool = False,
    checkpointing: bool = False,
    kind: str = "llama",
    tied: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Losses of this rank's batches, its data-parallel rank, and the active blocks by step."""
    dtype = torch.float32 if options.get("precision") == "fp32" else torch.bfloat16
    model = build(kind, dtype, **({"tied": tied} if tied else {}))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model, engine, booster = boosted(plugin, options, base=base, model=model.train(), **kwargs)
    group = getattr(booster.plugin, "dp_group", dist.group.WORLD)
    rank = dist.get_rank(group)
    seen, active = [], []
    for step in range(steps):
        active.append([block.name for block in engine.optim.active_blocks()])
        parts = []
        for micro in range(accumulate):
            batch = batch_of(step, rank * accumulate + micro, different)
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last or not no_sync else booster.no_sync(model, engine):
                loss = models.loss(model, batch)
                booster.backward(loss / accumulate, engine)
            parts.append(loss.item())
        engine.step()
        engine.zero_grad()
        seen.append(parts)
    frozen = all(p.requires_grad == (p in engine.masters.of) for p in model.unwrap(unwrap_peft=False).parameters())
    return {"losses": seen, "rank": rank, "active": active, "frozen": frozen}


def pipeline_losses(
    options: dict[str, Any], steps: int, num_layers: int, block: dict[str, Any] | None = None, tied: bool = False
) -> dict[str, Any]:
    """Losses of the pipeline (on its last stage) and the active block names of this stage, by step."""
    model = models.llama(layers=num_layers, tied=tied)
    model, engine, booster = boosted("hybrid", options, base="sgd", model=model, block=block)
    plugin = booster.plugin
    last = plugin.stage_manager.is_last_stage(ignore_chunk=True)
    rank = dist.get_rank(plugin.dp_group)
    seen, held = [], []
    names = {id(param): name for name, param in engine.optim.named_parameters.items()}
    for step in range(steps):
        held.append(sorted(names[id(param)] for param in engine.masters.of))
        batch = batch_of(step, rank, different=True)
        outputs = booster.execute_pipeline(
            iter([{"input_ids": batch, "labels": batch}]), model, lambda out, _: out.loss, engine, return_loss=True
        )
        engine.step()
        engine.zero_grad()
        seen.append(outputs["loss"].item() if last else None)
    return {"losses": seen, "rank": rank, "last": last, "held": held, "norm": engine.get_grad_norm()}
