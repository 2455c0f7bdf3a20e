"""BREAD with adapters: models of peft, a plain loop, and what ranks run."""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from on_ranks import message_of
from peft import LoraConfig, get_peft_model
from torch import nn

from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin

PERIOD, LAYERS, LR = 2, 3, 1e-3


def config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])


def peft_model(dtype: torch.dtype, wrapped: bool = True) -> nn.Module:
    model = models.llama(layers=LAYERS)
    if not wrapped:
        return model.to(dtype)
    torch.manual_seed(1)
    return get_peft_model(model, config()).to(dtype)


def is_adapter(name: str) -> bool:
    return "lora_" in name


def active_of(names: list[str], layer: int, mode: str) -> list[str]:
    """What trains while a layer is active, written down from BREAD's three modes."""
    inside = f".layers.{layer}."
    if mode == "adapter_only":
        return [name for name in names if inside in name and is_adapter(name)]
    base = [name for name in names if inside in name and not is_adapter(name)]
    from_layer = [name for name in names if is_adapter(name) and int(name.split(".layers.")[1].split(".")[0]) >= layer]
    return base + ([name for name in names if is_adapter(name)] if mode == "all" else from_layer)


def plain(model: nn.Module, mode: str, batches: Any, steps: int, reset: bool = False) -> dict[str, torch.Tensor]:
    """AdamW on float32 masters: of adapters for ever, of a block's weights until its period ends."""
    params = dict(model.named_parameters())
    masters: dict[str, torch.Tensor] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for step in range(steps):
        active = active_of(list(params), step // PERIOD % LAYERS, mode)
        if step % PERIOD == 0:
            for name in [name for name in masters if reset or not is_adapter(name)]:
                del masters[name], optimizers[name]
        for name in active:
            if name not in masters:
                masters[name] = params[name].detach().clone().float()
                optimizers[name] = torch.optim.AdamW([masters[name]], lr=LR, weight_decay=0.0)
        for name, param in params.items():
            param.requires_grad_(name in active)
        sums: dict[str, torch.Tensor] = {}
        for batch in batches(step):
            models.loss(model, batch).backward()
            for name in active:
                part = params[name].grad / len(batches(step))
                sums[name] = sums[name] + part if name in sums else part
                params[name].grad = None
        for name in active:
            masters[name].grad = sums[name].float()
            optimizers[name].step()
            params[name].data.copy_(masters[name])
    return {name: param.detach() for name, param in params.items()}


def wrap(model: nn.Module, mode: str | None, **options: Any) -> BlockOptimizer:
    cls = options.pop("base", torch.optim.AdamW)
    base = cls(model.parameters(), lr=LR, weight_decay=0.0)
    options = {"switch_block_every": PERIOD, "switch_mode": "ascending", "verbose": 0, "lora_mode": mode, **options}
    return BlockOptimizer(base, list(model.named_parameters()), **options)


def batches(num_ranks: int) -> Any:
    return lambda step: [models.tokens(10 * step + rank) for rank in range(num_ranks)]


def refused_by_division(tp_size: int, pp_size: int) -> str:
    options = {"tp_size": tp_size, "pp_size": pp_size, "precision": "fp32"}
    booster = Booster(plugin=HybridParallelPlugin(**options, **({"num_microbatches": 2} if pp_size > 1 else {})))
    model = peft_model(torch.float32)
    return message_of(lambda: booster.boost(model, wrap(model, "all")))


def boosted(mode: str, plugin: str, steps: int, by_booster: bool) -> dict[str, Any]:
    """Weights after training under a plugin, with adapters made by peft or by the booster."""
    cls: Any = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin}[plugin]
    options = {"stage": 2} if plugin == "zero" else {"tp_size": 1, "pp_size": 1, "zero_stage": 1}
    booster = Booster(plugin=cls(precision="bf16", **options))
    if by_booster:
        model: Any = models.llama(layers=LAYERS)
        torch.manual_seed(1)
        model = booster.enable_lora(model, lora_config=config()).to(torch.bfloat16)
    else:
        model = peft_model(torch.bfloat16)
    model, engine, *_ = booster.boost(model, wrap(model, mode))
    aside = []
    for step in range(steps):
        booster.backward(models.loss(model, batches(2)(step)[dist.get_rank()]), engine)
        engine.step()
        engine.zero_grad()
        aside.append(sum(master.numel() for master in engine.masters.active_set.aside.values()))
    weights = {name: param.detach() for name, param in model.unwrap(unwrap_peft=False).named_parameters()}
    state = sum(master.numel() for master in engine.masters.of.values())
    return {"weights": weights, "aside": aside, "held": state}
