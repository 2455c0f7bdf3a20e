"""What ranks run in test_galore_plugins.py: GaLore under the real plugins on given gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from on_ranks import equal_on_ranks, gradient
from torch import Tensor, nn

from colossal_bcd import BlockOptimizer, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin
from support.errors import largest_error

STEPS = 8
GAP = 3


def groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "layers" not in name]
    return [{"params": matrices, "rank": 4, "update_proj_gap": GAP, **options}, {"params": others}]


RULES: dict[str, Any] = {
    "adamw": partial(GaLoreAdamW, lr=1e-2),
    "sgd": partial(GaLoreSGD, lr=1e-5, momentum=0.9),
    "adafactor": partial(GaLoreAdafactor, lr=1e-2, relative_step=False, scale_parameter=False),
    "adamw8bit": partial(GaLoreAdamW8bit, lr=1e-2, weight_decay=0.0, min_8bit_size=0),
}


def trained_alone(options: dict[str, Any], rule: str = "adamw") -> dict[str, Tensor]:
    """Weights after the same steps on one process, in float32 from the bf16 weights."""
    model = models.llama().bfloat16().float()
    optimizer = RULES[rule](groups(model, **options))
    for step in range(STEPS):
        for name, param in model.named_parameters():
            param.grad = gradient(name, tuple(param.shape), step)
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def injected(
    plugin: str, plugin_options: dict[str, Any], options: dict[str, Any], rule: str = "adamw"
) -> dict[str, Any]:
    """Largest error of this rank's masters; whether replicas are equal; values of state held here and altogether."""
    model = models.llama()
    names = {id(param): name for name, param in model.named_parameters()}
    start = {name: param.detach().bfloat16().float() for name, param in model.named_parameters()}
    want = trained_alone(options, rule)
    optimizer = RULES[rule](groups(model, **options))
    made = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin}[plugin](precision="bf16", **plugin_options)
    booster = Booster(plugin=made)
    model, engine, *_ = booster.boost(model, optimizer)
    for step in range(STEPS):
        for param, layout in engine.layouts.items():
            param.grad = layout.shard(gradient(names[id(param)], layout.shape, step)).to(param.dtype)
        engine.sync_dp_grads()
        engine.step()
        engine.zero_grad()
    worst, equal, missed, way = 0.0, True, 0.0, 0.0
    for param in engine.layouts:
        part, master = engine.masters.layout(param), engine.masters.of[param]
        data = slice(0, part.num_local)
        goal, begin = (part.shard(of[names[id(param)]]).view(-1)[data] for of in (want, start))
        errors = (master.view(-1)[data] - goal).abs()
        missed, way = missed + errors.square().sum().item(), way + (goal - begin).square().sum().item()
        worst = max(worst, largest_error(master.view(-1)[data], goal))
        equal &= equal_on_ranks([param], getattr(booster.plugin, "dp_group", dist.group.WORLD))
    states = engine.optim.state
    held = sum(state[name].numel() for state in states.values() for name in ("exp_avg", "exp_avg_sq") if name in state)
    codes = sum(entry.dtype == torch.uint8 for state in states.values() for entry in state.values()
                if isinstance(entry, Tensor))  # fmt: skip
    return {"error": worst, "replicas": equal, "held": held, "missed": (missed / way) ** 0.5, "codes": codes}


def inside_blocks(world: int, options: dict[str, Any] | None = None, rule: str = "adamw") -> list[float]:
    """Losses of block coordinate descent with GaLore as base; a period spans a refresh."""
    model = models.llama(layers=2)
    base = RULES[rule](groups(model, **(options or {"svd_method": "random"})))
    wrapped = BlockOptimizer(
        base, model.named_parameters(), switch_block_every=GAP + 1, switch_mode="ascending", verbose=0
    )
    booster, engine = None, wrapped
    if world > 1:
        booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="fp32"))
        model, engine, *_ = booster.boost(model, wrapped)
    losses = []
    for step in range(2 * GAP + 4):
        loss = models.loss(model, models.tokens(step))
        loss.backward() if booster is None else booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    return losses
