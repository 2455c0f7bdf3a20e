"""What ranks run in test_checkpoints.py: train, save, and in a fresh process load and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from peft import LoraConfig, get_peft_model
from torch import nn

import colossal_bcd
from colossal_bcd import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.block import MomentumCorrection, OptimizerCorrection
from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin

LR = 1e-3
BEFORE, AFTER = 3, 2
"""Steps before the checkpoint, and after it; blocks switch every two, so it lies in the middle of the second."""
PERIOD = 2
SHARD = 0.2
"""MiB of tensors in one file of a checkpoint, which has several."""
BATCH = 12
"""Divisible by 1, 2, 3, 4: sequences of a step over all data-parallel ranks."""

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {"stage": 1}),
    "zero2 x2": (2, {"stage": 2}),
    "zero2 x3": (3, {"stage": 2}),
    "tp2": (2, {"tp_size": 2, "pp_size": 1, "zero_stage": 0}),
    "tp2+zero2 x4": (4, {"tp_size": 2, "pp_size": 1, "zero_stage": 2}),
    "fsdp x2": (2, {}),
    "fsdp x3": (3, {}),
    "tp2+fsdp x4": (4, {"tp_size": 2}),
    "pp2": (2, {"tp_size": 1, "pp_size": 2, "zero_stage": 1, "num_microbatches": 2}),
}


def projected(model: nn.Module, cls: Any, **options: Any) -> Any:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "layers" not in name]
    groups = [{"params": matrices, "rank": 4, "update_proj_gap": 2}, {"params": others}]
    return cls(groups, lr=LR, **options)


MAKE: dict[str, Any] = {
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=LR),
    "adamw": lambda model: colossal_bcd.AdamW(model.parameters(), lr=LR),
    "lamb": lambda model: colossal_bcd.Lamb(model.parameters(), lr=LR, weight_decay=0.1),
    "adafactor": lambda model: colossal_bcd.Adafactor(model.parameters(), lr=LR, relative_step=False, beta1=0.9),
    "came": lambda model: colossal_bcd.CAME(model.parameters(), lr=LR),
    "galore": lambda model: projected(model, colossal_bcd.GaLoreAdamW),
    "golore": lambda model: projected(model, colossal_bcd.GoLoreAdamW, random_from_step=2),
    "galore-adafactor": lambda model: projected(
        model, colossal_bcd.GaLoreAdafactor, relative_step=False, beta1=0.9, proj_type="reverse_std"
    ),
    "golore-sgd": lambda model: projected(model, colossal_bcd.GoLoreSGD, momentum=0.9, random_from_step=2),
    "adamw-8bit": lambda model: colossal_bcd.AdamW(model.parameters(), lr=LR, moment_bits=8),
    "galore-8bit": lambda model: projected(model, colossal_bcd.GaLoreAdamW, moment_bits=8),
    "came-8bit": lambda model: colossal_bcd.CAME(model.parameters(), lr=LR, moment_bits=8),
    "badam": lambda model: blocks(model, torch.optim.AdamW(model.parameters(), lr=LR)),
    "bread": lambda model: blocks(
        model, torch.optim.AdamW(model.parameters(), lr=LR), sgd_mode="all", correction=MomentumCorrection()
    ),
    "bread-galore": lambda model: blocks(
        model,
        torch.optim.AdamW(model.parameters(), lr=LR),
        sgd_mode="all",
        correction=OptimizerCorrection(colossal_bcd.GaLoreSGD, rank=4, update_proj_gap=2, momentum=0.9),
    ),
    "bread-adafactor-8bit": lambda model: blocks(
        model,
        torch.optim.AdamW(model.parameters(), lr=LR),
        sgd_mode="all",
        correction=OptimizerCorrection(colossal_bcd.Adafactor, relative_step=False, beta1=0.9, moment_bits=8),
    ),
    "badam-residual": lambda model: blocks(
        model, torch.optim.AdamW(model.parameters(), lr=LR), residual="keep", switch_mode="ascending"
    ),
    "badam-came": lambda model: blocks(model, colossal_bcd.CAME(model.parameters(), lr=LR)),
    "ratio": lambda model: ratio(model, "scatter"),
    "ratio-adjacent": lambda model: ratio(model, "adjacent"),
    # When it is saved, in the third of the blocks, adapters of the first two wait; they train again before it ends.
    "bread-lora": lambda model: blocks(
        model,
        torch.optim.AdamW(model.parameters(), lr=LR),
        lora_mode="partial",
        switch_mode="ascending",
        switch_block_every=2,
    ),
}
OPTIMIZERS = list(MAKE)
ADAPTERS = {"bread-lora", "bread-lora-came"}
"""Optimizers of models with adapters, which ColossalAI trains on meshes of data-parallel ranks only."""
MAKE["bread-lora-came"] = lambda model: blocks(
    model,
    colossal_bcd.CAME(model.parameters(), lr=LR),
    lora_mode="adapter_only",
    switch_mode="ascending",
    switch_block_every=2,
)
MAKE["badam-ascending"] = lambda model: blocks(
    model, torch.optim.AdamW(model.parameters(), lr=LR), switch_mode="ascending", start_block=1, switch_block_every=3
)


def blocks(model: nn.Module, base: Any, **options: Any) -> BlockOptimizer:
    names = list(model.named_parameters())
    return BlockOptimizer(base, names, **{"switch_block_every": PERIOD, "seed": 1, "verbose": 0, **options})


def ratio(model: nn.Module, mode: Any) -> BlockOptimizerRatio:
    return BlockOptimizerRatio(
        model.parameters(),
        list(model.named_parameters()),
        update_ratio=0.3,
        switch_every=PERIOD,
        mask_mode=mode,
        lr=LR,
        verbose=0,
    )


def fitting(names: list[str], *meshes: str) -> list[str]:
    """Those of the optimizers that run on the meshes."""
    divided = any("tp" in mesh or "pp" in mesh for mesh in meshes)
    return [name for name in names if not (divided and name in ADAPTERS)]


class Run:
    """A boosted Llama of three layers whose vocabulary tensor parallelism pads."""

    def __init__(self, mesh: str, optimizer: str, **overrides: Any) -> None:
        options = {"precision": "bf16", **MESHES[mesh][1], **overrides}
        plugin: Any = FSDP2Plugin
        if "fsdp" not in mesh:
            plugin = LowLevelZeroPlugin if "stage" in options else HybridParallelPlugin
            options = {"initial_scale": 2.0**8, **options}
        vocab = options.pop("vocab", 250)
        dtype = torch.float32 if options["precision"] == "fp32" else torch.bfloat16
        model: Any = models.llama(vocab=vocab, layers=3)
        if optimizer in ADAPTERS:
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
        model = model.to(dtype)
        made = MAKE[optimizer](model)
        self.scheduler: Any = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
        self.booster = Booster(plugin=plugin(**options))
        self.model, self.engine, _, _, self.scheduler = self.booster.boost(model, made, lr_scheduler=self.scheduler)

    def step(self, number: int) -> float | None:
        """Loss over the whole batch, on the ranks that know it."""
        plugin = self.booster.plugin
        group = getattr(plugin, "dp_group", dist.group.WORLD)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if isinstance(plugin, FSDP2Plugin):  # tensor-parallel ranks have equal losses, too
            ranks, rank = plugin.world_size, plugin.rank
        batch = models.tokens(number, batch=BATCH, vocab=250).chunk(ranks)[rank]
        if getattr(plugin, "pp_size", 1) > 1:
            data = iter([{"input_ids": batch, "labels": batch}])
            outputs = self.booster.execute_pipeline(
                data, self.model, lambda out, _: out.loss, self.engine, return_loss=True
            )
            loss = outputs["loss"]
        else:
            loss = self.model(input_ids=batch, labels=batch).loss
            self.booster.backward(loss, self.engine)
        self.engine.step()
        self.engine.zero_grad()
        self.scheduler.step()
        if loss is None:
            return None
        total = loss.detach().float().clone()
        dist.all_reduce(total, group=group)
        return (total / dist.get_world_size(group)).item()

    def save(self, folder: str, shard: bool = True) -> None:
        self.booster.save_model(self.model, f"{folder}/model", shard=True, use_safetensors=True)
        self.booster.save_optimizer(self.engine, f"{folder}/optimizer", shard=shard, size_per_shard=SHARD)
        self.booster.save_lr_scheduler(self.scheduler, f"{folder}/scheduler")
        dist.barrier()

    def load(self, folder: str) -> None:
        self.booster.load_model(self.model, f"{folder}/model")
        self.booster.load_optimizer(self.engine, f"{folder}/optimizer")
        self.booster.load_lr_scheduler(self.scheduler, f"{folder}/scheduler")


def before(optimizer: str) -> int:
    """Steps before the checkpoint; of models with adapters until the third block trains."""
    return BEFORE + PERIOD * (optimizer in ADAPTERS)


def goes_on(run: Run, optimizer: str) -> list[float | None]:
    return [run.step(before(optimizer) + step) for step in range(AFTER)]


def train_and_save(mesh: str, optimizer: str, folder: str, shard: bool = True, **overrides: Any) -> list[float | None]:
    """Save after `BEFORE` steps, and go on: the losses after the checkpoint."""
    run = Run(mesh, optimizer, **overrides)
    for step in range(before(optimizer)):
        run.step(step)
    run.save(folder, shard)
    return goes_on(run, optimizer)


def resume(mesh: str, optimizer: str, folder: str, again: str = "", **overrides: Any) -> list[float | None]:
    """In a fresh process: the losses after the checkpoint; what was loaded is saved once more to `again`."""
    run = Run(mesh, optimizer, **overrides)
    run.load(folder)
    if again:
        run.save(again)
    return goes_on(run, optimizer)


def train_and_save_each(mesh: str, optimizers: list[str], folder: str) -> dict[str, list[float | None]]:
    return {name: train_and_save(mesh, name, str(Path(folder, name))) for name in optimizers}


def resume_each(mesh: str, optimizers: list[str], folder: str, again: str) -> dict[str, list[float | None]]:
    return {name: resume(mesh, name, str(Path(folder, name)), str(Path(again, name))) for name in optimizers}
