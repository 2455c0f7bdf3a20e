"""What ranks run in test_factored_plugins.py: Adafactor and CAME in blocks, and AdafactorSchedule, boosted."""

from __future__ import annotations

from typing import Any

import block_cases
import models
import torch
from block_cases import PERIOD
from colossalai.booster import Booster
from torch import Tensor, nn
from transformers import optimization

from colossal_bcd import Adafactor
from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin

FP32 = {"precision": "fp32"}
PLUGINS: dict[str, Any] = {
    "zero": lambda: LowLevelZeroPlugin(stage=2, **FP32),
    "tp": lambda: HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=0, **FP32),
    "fsdp": lambda: FSDP2Plugin(**FP32),
}


def block_losses(base: str, steps: int) -> dict[str, Any]:
    """Losses on one batch for both ranks, and what the base optimizer's state is after every step."""
    model = block_cases.build(dtype=torch.float32)
    model, engine, booster = block_cases.boosted("zero", {"stage": 2, **FP32}, base=base, model=model.train())
    losses, states = [], []
    for step in range(steps):
        active = set(engine.masters.of.values())
        loss = models.loss(model, block_cases.batch_of(step, 0, different=False))
        booster.backward(loss, engine)
        engine.step()
        state = engine.optim.base_optimizer.state
        if (step + 1) % PERIOD:
            assert set(state) == active
            states.append({entry["step"] for entry in state.values()})
        else:
            states.append(set(state))
        engine.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "states": states}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1]},
        {"params": [p for p in params if p.dim() <= 1], "warmup_init": True},
    ]


def scheduled_lrs(plugin: str | None, made_on: str, steps: int) -> list[list[float]]:
    """What an AdafactorSchedule says before the first and after every step; it is made before or after boosting."""
    model = models.llama()
    optimizer: Any = (Adafactor if made_on == "ours" else optimization.Adafactor)(two_groups(model))
    schedule = optimization.AdafactorSchedule(optimizer, 0.25) if made_on != "engine" else None
    booster = None
    if plugin is not None:
        booster = Booster(plugin=PLUGINS[plugin]())
        model, optimizer, *_ = booster.boost(model, optimizer)
    schedule = schedule or optimization.AdafactorSchedule(optimizer, 0.25)
    # Floats at once: the original's are tensors, which the next step overwrites.
    seen = [[float(lr) for lr in schedule.get_last_lr()]]
    for step in range(steps):
        loss = models.loss(model, models.tokens(step))
        if booster is None:
            loss.backward()
        else:
            booster.backward(loss, optimizer)
        optimizer.step()
        schedule.step()
        seen.append([float(lr) for lr in schedule.get_last_lr()])
        optimizer.zero_grad()
    return seen


def missing_after_a_step() -> bool:
    """Whether a parameter without a gradient stays as it is, in the step after one in which it had one."""
    model = models.llama()
    engine: Any
    booster = Booster(plugin=PLUGINS["zero"]())
    model, engine, *_ = booster.boost(model, Adafactor(model.parameters(), weight_decay=0.1))
    first = next(iter(engine.masters.of))
    batch = models.tokens(0)
    booster.backward(models.loss(model, batch), engine)
    engine.step()
    before = first.detach().clone()
    embeddings = model.module.model.embed_tokens(batch).detach()
    booster.backward(model(inputs_embeds=embeddings, labels=batch).loss, engine)
    engine.step()
    return torch.equal(first.detach(), before)


def scheduled_lrs_of_blocks(steps: int) -> list[tuple[list[float], float]]:
    """Under a plugin: what the schedule says after every step, and what the first active weight says that it should."""
    model = block_cases.build(dtype=torch.float32)
    model, engine, booster = block_cases.boosted("zero", {"stage": 2, **FP32}, base="adafactor", model=model.train())
    schedule = optimization.AdafactorSchedule(engine.optim, 0.25)
    seen = []
    for step in range(steps):
        master = engine.param_groups[0]["params"][0]
        weight: Tensor = engine.master_to_working_param[id(master)]
        rms = weight.detach().double().square().mean().sqrt().item()
        booster.backward(models.loss(model, block_cases.batch_of(step, 0, different=False)), engine)
        engine.step()
        schedule.step()
        # No gradients after a switch.
        want = 0.25 if (step + 1) % PERIOD == 0 else max(1e-3, rms) * min(1e-2, (1 + step % PERIOD) ** -0.5)
        seen.append(([float(lr) for lr in schedule.get_last_lr()], want))
        engine.zero_grad()
    return seen
