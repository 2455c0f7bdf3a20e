"""What ranks run in test_block_residual.py, and the same on one process."""

from __future__ import annotations

from typing import Any

import checkpoint_cases
import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster

from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin

PERIOD, LAYERS, LR = 2, 3, 1e-4


def wrap(model: Any, **options: Any) -> BlockOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    options = {"switch_block_every": PERIOD, "switch_mode": "ascending", "verbose": 0, "residual": "keep", **options}
    return BlockOptimizer(base, list(model.named_parameters()), **options)


def weights(plugin: dict[str, Any] | None, **options: Any) -> list[torch.Tensor]:
    """bfloat16 weights after two rounds of all blocks; every rank sees the same batches."""
    model: Any = models.llama(layers=LAYERS).bfloat16()
    optimizer = wrap(model, **options)
    if plugin is not None:
        cls: Any = LowLevelZeroPlugin if "stage" in plugin else HybridParallelPlugin
        booster = Booster(plugin=cls(precision="bf16", **plugin))
        model, engine, *_ = booster.boost(model, optimizer)
    for step in range(PERIOD * 2 * LAYERS):
        loss = models.loss(model, models.tokens(step))
        if plugin is not None:
            booster.backward(loss, engine)
            engine.step()
            engine.zero_grad()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if plugin is not None:
        _check_held(engine, options, divided=plugin.get("zero_stage") != 0)
    return [param.detach() for param in model.parameters()]


def _check_held(engine: Any, options: dict[str, Any], *, divided: bool) -> None:
    """As many bytes as were asked for, of the layers that wait, over the ZeRO ranks."""
    values = sum(param.numel() for layer in range(1, LAYERS) for param in _layer(engine, layer))
    want = values * options.get("residual_bits", 16) // 8 // (dist.get_world_size() if divided else 1)
    held = sum(value.untyped_storage().nbytes() for value in engine.masters.active_set.residuals.of.values())
    assert held == want, (held, want)


def _layer(engine: Any, layer: int) -> list[Any]:
    return [param for param in engine.layouts if f".layers.{layer}." in engine.parameter_names[id(param)]]


def weights_each(plugin: dict[str, Any], options: dict[str, Any]) -> list[torch.Tensor]:
    return weights(plugin, **options)


checkpoint_cases.MAKE["residuals"] = lambda model: checkpoint_cases.blocks(
    model,
    torch.optim.AdamW(model.parameters(), lr=LR),
    residual="keep",
    residual_bits=8,
    residual_offload=True,
    switch_mode="ascending",
)


def train_and_save(mesh: str, folder: str) -> list[float | None]:
    return checkpoint_cases.train_and_save(mesh, "residuals", folder)


def resume(mesh: str, folder: str, again: str = "") -> list[float | None]:
    return checkpoint_cases.resume(mesh, "residuals", folder, again)
