"""The methods that bread_vs_badam.py compares, and what one step of each sends between two ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_bcd import AdamW, BlockOptimizer, GaLoreAdamW, param_groups
from colossal_bcd.testing import CollectiveCounter

HIDDEN, LAYERS, VOCAB, RANK, PERIOD = 64, 4, 257, 8, 10


def llama(seed: int) -> nn.Module:
    """A Llama with random weights that depend on the seed alone."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 5 // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        # Blocks are trained one at a time: with the usual 0.02 the others would pass on next to nothing.
        initializer_range=HIDDEN**-0.5,
        max_position_embeddings=512,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def with_adapters(model: nn.Module) -> nn.Module:
    """Adapters on all matrices of the layers."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    build: Any = peft
    adapted: nn.Module = build.get_peft_model(
        model, build.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    )
    return adapted


def blocks(**options: Any) -> Callable[[nn.Module, float, int], Optimizer]:
    """A BlockOptimizer around AdamW."""

    def make(model: nn.Module, lr: float, seed: int) -> Optimizer:
        named = list(model.named_parameters())
        base = AdamW(model.parameters(), lr=lr)
        return BlockOptimizer(base, named, switch_block_every=PERIOD, seed=seed, verbose=0, **options)

    return make


@dataclass(frozen=True)
class Method:
    """How a method trains, and the learning rates that are tried."""

    make: Callable[[nn.Module, float, int], Optimizer]
    rates: tuple[float, ...]
    adapters: bool = False

    def build(self, seed: int) -> nn.Module:
        model = llama(seed)
        return with_adapters(model) if self.adapters else model


def _lora(model: nn.Module, lr: float, seed: int) -> Optimizer:
    return AdamW([param for param in model.parameters() if param.requires_grad], lr=lr)


def _galore(model: nn.Module, lr: float, seed: int) -> Optimizer:
    groups = param_groups(model, rank=RANK, update_proj_gap=50, scale=1.0, target_modules=["self_attn", "mlp"])
    return GaLoreAdamW(groups, lr=lr)


METHODS = {
    "AdamW": Method(lambda model, lr, seed: AdamW(model.parameters(), lr=lr), (1e-3, 3e-3, 1e-2)),
    "BAdam": Method(blocks(), (3e-3, 1e-2, 3e-2)),
    # BREAD moves the embedding and the head, too, which are in no block by default.
    "BAdam, all": Method(blocks(include_embedding=True, include_lm_head=True), (3e-3, 1e-2, 3e-2)),
    "BREAD-SGD": Method(blocks(sgd_mode="all", sgd_lr_scaling=50.0), (3e-3, 1e-2, 3e-2)),
    "BREAD-sign": Method(blocks(sgd_mode="all", sgd_use_sign=True, sgd_lr_scaling=0.1), (3e-3, 1e-2, 3e-2)),
    "BREAD-LoRA": Method(blocks(lora_mode="all"), (1e-3, 3e-3, 1e-2), adapters=True),
    "LoRA": Method(_lora, (1e-3, 3e-3, 1e-2), adapters=True),
    "GaLore": Method(_galore, (3e-3, 1e-2, 3e-2)),
}


def sent(name: str) -> int:
    """Payload of the collectives of one step on one of two ranks, ZeRO stage 2 in bfloat16; run by run_ranks."""
    from colossalai.booster import Booster

    from colossal_bcd.booster import LowLevelZeroPlugin

    method = METHODS[name]
    model: Any = method.build(0).bfloat16()
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    engine: Any
    model, engine, *_ = booster.boost(model, method.make(model, 1e-3, 0))
    tokens = torch.randint(0, VOCAB, (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in range(2):
        with CollectiveCounter() as counter:
            booster.backward(model(input_ids=tokens, labels=tokens).loss, engine)
            engine.step()
            engine.zero_grad()
        if step == 1:
            return sum(counter.bytes.values())
    raise AssertionError("the second step is measured")
