"""What ranks run in test_checkpoint_foreign.py: state of plain PyTorch, badam and ColossalAI; ColossalAI's plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import badam
import checkpoint_cases as cases
import models
import torch
import torch.distributed as dist
from checkpoint_cases import LR, Run
from checkpoint_error_cases import message
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin, LowLevelZeroPlugin
from colossalai.nn.optimizer import Lamb
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor, nn

from colossal_bcd import CAME, BlockOptimizer
from colossal_bcd.booster import install
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.stock_plugins import _check_on_cpu

STEPS = 2


def plain(dtype: torch.dtype = torch.float32, vocab: int = 250) -> nn.Module:
    return models.llama(vocab=vocab, layers=3).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        models.loss(model, models.tokens(step, vocab=250)).backward()
        optimizer.step()
        optimizer.zero_grad()


def write_plain(folder: str) -> None:
    """Files of a plain AdamW, of one with an option that is not ours, and of badam's optimizer."""
    for name, options in {"adamw": {}, "amsgrad": {"amsgrad": True}}.items():
        model = plain()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **options)
        train(model, optimizer)
        torch.save(optimizer.state_dict(), Path(folder, name))
    model = plain()
    base = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    wrapped = badam.BlockOptimizer(
        base, list(model.named_parameters()), switch_block_every=4, switch_mode="ascending", start_block=1, verbose=0
    )
    train(model, wrapped)
    torch.save(wrapped.state_dict(), Path(folder, "badam"))


def loaded(optimizer: str, mesh: str, path: str, again: str, vocab: int = 250) -> dict[str, Any]:
    """Load a foreign file and save it as ours."""
    run = Run(mesh, optimizer, vocab=vocab)
    run.booster.load_optimizer(run.engine, path)
    run.booster.save_optimizer(run.engine, again, shard=True)
    loss = run.step(0)
    return {"lr": run.engine.param_groups[0]["lr"], "loss": loss}


def load_amsgrad(path: str) -> str:
    run = Run("zero2 x2", "adamw")
    return message(lambda: run.booster.load_optimizer(run.engine, path))


def load_badam(path: str, again: str) -> dict[str, Any]:
    run = Run("zero2 x2", "badam-ascending")
    run.booster.load_optimizer(run.engine, path)
    run.booster.save_optimizer(run.engine, again, shard=True)
    block: BlockOptimizer = run.engine.optim
    taken, active = block.num_steps, block.active_blocks()[0].name
    run.step(0)
    return {"taken": taken, "active": active, "next": block.active_blocks()[0].name}


def write_colossalai(plugin: str, folder: str, vocab: int) -> None:
    """Checkpoints by ColossalAI alone of its own Lamb, whole and sharded."""
    install_cpu_accelerator()
    LowLevelZeroOptimizer._sanity_checks = _check_on_cpu  # type: ignore[method-assign]
    made: Any = LowLevelZeroPlugin(stage=2, precision="bf16")
    if plugin == "hybrid":
        made = HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=0, precision="fp32")
    model = plain(torch.float32 if plugin == "hybrid" else torch.bfloat16, vocab)
    booster = Booster(plugin=made)
    model, engine, *_ = booster.boost(model, Lamb(model.parameters(), lr=LR))
    for step in range(STEPS):
        booster.backward(model(**dict.fromkeys(("input_ids", "labels"), models.tokens(step, vocab=250))).loss, engine)
        engine.step()
        engine.zero_grad()
    booster.save_optimizer(engine, f"{folder}/whole.bin")
    booster.save_optimizer(engine, f"{folder}/sharded", shard=True)
    dist.barrier()


class Stock(Run):
    """Under ColossalAI's own plugins after `install()`."""

    def __init__(self, plugin: str) -> None:
        install()
        model = plain(torch.bfloat16)
        made = CAME(model.parameters(), lr=LR)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
        options = {"precision": "bf16"}
        if plugin == "zero":
            self.booster = Booster(plugin=LowLevelZeroPlugin(stage=2, **options))
        else:
            self.booster = Booster(plugin=HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=0, **options))
        self.model, self.engine, _, _, self.scheduler = self.booster.boost(model, made, lr_scheduler=self.scheduler)


def stock_saves(plugin: str, folder: str) -> list[float | None]:
    run = Stock(plugin)
    for step in range(cases.BEFORE):
        run.step(step)
    run.save(folder)
    return [run.step(cases.BEFORE + step) for step in range(cases.AFTER)]


def stock_resumes(plugin: str, folder: str, again: str) -> list[float | None]:
    run = Stock(plugin)
    run.load(folder)
    run.save(again)
    return [run.step(cases.BEFORE + step) for step in range(cases.AFTER)]


def of_state(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of torch's kind of state dict by the names of files."""
    names = [name for name, _ in model.named_parameters()]
    return {
        f"{names[key]}.{state}": value
        for key, states in state_dict["state"].items()
        for state, value in states.items()
        if state != "step"
    }
