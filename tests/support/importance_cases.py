"""What ranks run in test_block_importance.py: blocks drawn by norms under the real plugins."""

from __future__ import annotations

from typing import Any

import block_cases
import checkpoint_cases
import models
import torch
import torch.distributed as dist

from colossal_bcd import BlockOptimizer
from colossal_bcd.testing import CollectiveCounter

LAYERS, PERIOD, SEED = 4, 2, 3
FP32 = {"precision": "fp32"}
PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero2": ("zero", {"stage": 2, **FP32}),
    "tp2": ("hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 0, **FP32}),
    "pp2": ("hybrid", {"tp_size": 1, "pp_size": 2, "zero_stage": 1, "num_microbatches": 2, **FP32}),
    "tp2-zero2": ("hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 2, **FP32}),
    "pp2-tp2": ("hybrid", {"tp_size": 2, "pp_size": 2, "zero_stage": 0, "num_microbatches": 2, **FP32}),
    "tp2-dp2": ("hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 0, **FP32}),
}


def block_options(**options: Any) -> dict[str, Any]:
    return {"switch_mode": "importance", "switch_block_every": PERIOD, "seed": SEED, **options}


def wrap(model: Any, **options: Any) -> BlockOptimizer:
    base = block_cases.base_optimizer("sgd", model.parameters())
    options = {"verbose": 0, **block_options(**options)}
    return BlockOptimizer(base, list(model.named_parameters()), **options)


def alone(steps: int, ranks: int, **options: Any) -> tuple[list[Any], list[Any]]:
    """Active blocks by step, and norms, on one process that adds up the ranks' batches."""
    model = models.llama(layers=LAYERS)
    optimizer = wrap(model, **options)
    active = []
    for step in range(steps):
        active.append(optimizer.schedule.active(optimizer.num_steps))
        for rank in range(ranks):
            (models.loss(model, block_cases.batch_of(step, rank, different=True)) / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.importance is not None
    return active, optimizer.importance.norms


def under(name: str, steps: int, **options: Any) -> dict[str, Any]:
    """Active blocks and number of collectives by step, and norms, under a plugin."""
    plugin, arguments = PLUGINS[name]
    block = block_options(**options)
    model, engine, booster = block_cases.boosted(
        plugin, arguments, base="sgd", model=models.llama(layers=LAYERS), block=block
    )
    group = getattr(booster.plugin, "dp_group", dist.group.WORLD)
    active, calls = [], []
    for step in range(steps):
        active.append(engine.optim.schedule.active(engine.optim.num_steps))
        batch = block_cases.batch_of(step, dist.get_rank(group), different=True)
        if arguments.get("pp_size", 1) > 1:
            data = iter([{"input_ids": batch, "labels": batch}])
            booster.execute_pipeline(data, model, lambda out, _: out.loss, engine, return_loss=True)
        else:
            booster.backward(models.loss(model, batch), engine)
        with CollectiveCounter() as counter:
            engine.step()
        calls.append(counter.total)
        engine.zero_grad()
    norms = engine.optim.importance.norms if engine.optim.importance is not None else None
    return {"active": active, "calls": calls, "norms": norms, "ranks": dist.get_world_size(group)}


def under_each(runs: list[tuple[str, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [under(name, steps, **options) for name, steps, options in runs]


def norms_of_weights(runs: list[tuple[str, bool]]) -> list[list[float]]:
    """Of all blocks, before the first step, by plugin and whether the head is tied to the embedding."""
    found = []
    for name, tied in runs:
        plugin, arguments = PLUGINS[name]
        model = models.llama(vocab=250, layers=LAYERS, tied=tied)
        block = block_options(include_embedding=True, include_lm_head=not tied)
        _, engine, _booster = block_cases.boosted(plugin, arguments, base="sgd", model=model, block=block)
        optimizer = engine.optim
        found.append(optimizer._weights(range(len(optimizer.blocks))).tolist())
    return found


checkpoint_cases.MAKE["importance"] = lambda model: BlockOptimizer(
    torch.optim.AdamW(model.parameters(), lr=checkpoint_cases.LR),
    list(model.named_parameters()),
    switch_block_every=PERIOD,
    switch_mode="importance",
    seed=1,
    verbose=0,
)
BEFORE, AFTER = 9, 8
"""Epochs are of six steps: saved in the middle of a block of the second one, and two more are drawn afterwards."""


def goes_on(run: checkpoint_cases.Run) -> dict[str, Any]:
    active, losses = [], []
    for step in range(BEFORE, BEFORE + AFTER):
        active.append([block.name for block in run.engine.optim.active_blocks()])
        losses.append(run.step(step))
    return {"active": active, "losses": losses}


def train_and_save(mesh: str, folder: str) -> dict[str, Any]:
    run = checkpoint_cases.Run(mesh, "importance")
    for step in range(BEFORE):
        run.step(step)
    run.save(folder)
    return goes_on(run)


def resume(mesh: str, folder: str, again: str = "") -> dict[str, Any]:
    run = checkpoint_cases.Run(mesh, "importance")
    run.load(folder)
    if again:
        run.save(again)
    return goes_on(run)


def under_fp16(steps: int) -> list[Any]:
    """Norms of a run whose gradients carry a loss scale."""
    arguments = {"stage": 1, "precision": "fp16", "initial_scale": 2.0**10}
    model = models.llama(layers=LAYERS).half()
    model, engine, booster = block_cases.boosted("zero", arguments, base="sgd", model=model, block=block_options())
    for step in range(steps):
        booster.backward(models.loss(model, block_cases.batch_of(step, 0, different=True)), engine)
        engine.step()
        engine.zero_grad()
    assert engine.optim.num_steps == steps, "no step was skipped"
    return engine.optim.importance.norms
