"""What ranks run in test_fsdp_adapters.py: blocks of LoRA adapters on sharded weights."""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.distributed as dist
from fsdp_block_cases import LAYERS, PERIOD, VOCAB, batch, loss_of, whole
from peft import LoraConfig, get_peft_model
from torch import nn

from colossal_bcd import BlockOptimizer, fsdp


def build() -> nn.Module:
    model = models.llama(vocab=VOCAB, layers=LAYERS)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, config).train()


def make(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def run() -> dict[str, bool]:
    """Whether losses and weights are those of one process, bit for bit."""
    fsdp.enable_cpu()
    model = fsdp.shard(build())
    options: dict[str, Any] = {"switch_block_every": PERIOD, "switch_mode": "ascending", "verbose": 0}
    optimizer = BlockOptimizer(make(model.parameters()), list(model.named_parameters()), **options)
    fsdp.attach(model, optimizer)
    reference = build()
    params = dict(reference.named_parameters())
    losses, want = [], []
    for step in range(PERIOD * (LAYERS + 1)):
        if step % PERIOD == 0:
            active = optimizer.active_names()
            plain = make([params[name] for name in active])
        loss = loss_of(model, batch(step, dist.get_rank()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        reference.zero_grad()
        each = [loss_of(reference, batch(step, rank)) for rank in range(dist.get_world_size())]
        for loss in each:
            (loss / len(each)).backward()
        plain.step()
        want.append(each[dist.get_rank()].item())
    same = all(torch.equal(whole(p), params[name]) for name, p in model.named_parameters())
    return {"losses": losses == want, "weights": same, "adapters": all("lora_" in name for name in active)}
