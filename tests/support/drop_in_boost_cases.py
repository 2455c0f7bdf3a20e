"""What ranks run in test_drop_in_boost.py: param groups that hold anything, and adapters made after the optimizer."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.quantization import BnbQuantizationConfig
from on_ranks import message_of
from torch import nn

import colossal_bcd
from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin

FP32 = {"precision": "fp32"}
PLUGINS: dict[str, Any] = {
    "zero": lambda: LowLevelZeroPlugin(stage=2, **FP32),
    "hybrid": lambda: HybridParallelPlugin(tp_size=1, pp_size=1, zero_stage=1, **FP32),
    "hybrid-0": lambda: HybridParallelPlugin(tp_size=1, pp_size=1, zero_stage=0, **FP32),
    "ddp": TorchDDPPlugin,
}
OPTIMIZERS: dict[str, Any] = {
    "torch": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "AdamW": lambda params: colossal_bcd.AdamW(params, lr=1e-2),
    "Lamb": lambda params: colossal_bcd.Lamb(params, lr=1e-2),
    "Adafactor": lambda params: colossal_bcd.Adafactor(params, lr=1e-2, relative_step=False),
    "CAME": lambda params: colossal_bcd.CAME(params, lr=1e-2),
    "GaLoreAdamW": lambda params: colossal_bcd.GaLoreAdamW(params, lr=1e-2, rank=2),
    "GaLoreSGD": lambda params: colossal_bcd.GaLoreSGD(params, lr=1e-2, rank=2),
}


def scale(value: float) -> float:
    """Something that a param group may hold."""
    return value


class Thing:
    """Prints its address."""

    def method(self) -> None: ...


@dataclass(frozen=True)
class Options:
    thing: Thing
    rank: int = 4


class Kind(enum.Enum):
    LEFT = 1


def values() -> dict[str, Any]:
    """Of every kind that prints an address or an order of its own."""
    return {
        "function": scale,
        "lambda": lambda value: value,
        "partial": functools.partial(scale, value=2.0),
        "object": Thing(),
        "method": Thing().method,
        "class": Thing,
        "nested": {"thing": Thing(), "list": [scale, (Thing(), 2)]},
        "set": {"x", "y", "zz", "another"},
        "options": Options(Thing()),
        "kind": Kind.LEFT,
        "dtype": torch.bfloat16,
        "tensor": torch.tensor([1.0, 2.0]),
        "module": nn.Linear(2, 2),
        "generator": torch.Generator(),
    }


def boost(plugin: str, extra: dict[str, Any]) -> str:
    """The error of boosting with these in a param group."""
    model = models.llama() if plugin.startswith("hybrid") else nn.Linear(3, 3)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), **extra}], lr=0.1)
    booster = Booster(plugin=PLUGINS[plugin]())
    return message_of(lambda: booster.boost(model, optimizer))


def param_groups() -> dict[str, Any]:
    """Errors of boosting with equal values, and with others on each rank."""
    waste = [Thing() for _ in range(dist.get_rank() * 7)]  # so that addresses differ
    same = {plugin: boost(plugin, values()) for plugin in PLUGINS}
    rank = dist.get_rank()
    other = {
        "function": boost("zero", {"hook": scale if rank else print}),
        "number": boost("zero", {"list": [1, (2, rank)]}),
        "object": boost("zero", {"thing": Thing() if rank else Options(waste or Thing())}),
        "options": boost("zero", {"options": Options(Thing(), rank)}),
        "partial": boost("zero", {"partial": functools.partial(scale, value=rank)}),
    }
    return {"same": same, "other": other}


def train(plugin: str, optimizer: str, when: str) -> list[float]:
    """Losses with adapters that were made before or after the optimizer."""
    from peft import LoraConfig

    model = models.llama()
    made = OPTIMIZERS[optimizer](model.parameters()) if when == "before" else None
    booster = Booster(plugin=PLUGINS[plugin]())
    torch.manual_seed(0)
    # ColossalAI's ShardFormer replaces the head, and not inside of peft's wrapper for copies.
    copies = None if plugin.startswith("hybrid") else ["lm_head"]
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=copies)
    adapted = booster.enable_lora(model, lora_config=config)
    made = OPTIMIZERS[optimizer](adapted.parameters()) if made is None else made
    boosted, engine, *_ = booster.boost(adapted, made)
    losses = []
    for step in range(3):
        tokens = models.tokens(10 * step + dist.get_rank())
        loss = boosted(input_ids=tokens, labels=tokens).loss
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    return losses


def lora() -> dict[str, Any]:
    """Losses by plugin and optimizer, made before and after."""
    chosen = [("zero", name) for name in OPTIMIZERS]
    chosen += [(plugin, name) for plugin in PLUGINS if plugin != "zero" for name in ("torch", "Lamb")]
    return {f"{plugin} {name}": [train(plugin, name, when) for when in ("before", "after")] for plugin, name in chosen}


def lora_errors() -> dict[str, str]:
    """Of blocks made before the adapters, by plugin, and of quantized weights on this machine."""
    from peft import LoraConfig

    seen = {}
    config = LoraConfig(r=4, target_modules=["q_proj"])
    for plugin, make in PLUGINS.items():
        model = models.llama()
        base = torch.optim.AdamW(model.parameters())
        block = BlockOptimizer(base, list(model.named_parameters()), verbose=0)
        booster = Booster(plugin=make())
        adapted = booster.enable_lora(model, lora_config=config)
        try:
            booster.boost(adapted, block)
        except ValueError as error:
            seen[f"block {plugin}"] = str(error)
        try:
            booster.enable_lora(
                models.llama(), lora_config=config, bnb_quantization_config=BnbQuantizationConfig(load_in_4bit=True)
            )
        except ValueError as error:
            seen[f"quantized {plugin}"] = str(error)
    return seen


def everything() -> dict[str, Any]:
    return {"groups": param_groups(), "lora": lora(), "errors": lora_errors()}
