"""What ranks run in test_engine.py: properties of the engine under block coordinate descent."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import block_cases
import models
import torch
import torch.distributed as dist
from block_cases import LAYERS, PERIOD
from colossalai.booster import Booster

import colossal_bcd
from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import LowLevelZeroPlugin, estimate
from colossal_bcd.testing import CollectiveCounter, PeakBytes, live_bytes


def advance(model: Any, engine: Any, booster: Booster, step: int) -> None:
    booster.backward(models.loss(model, block_cases.batch_of(step, dist.get_rank(), different=True)), engine)
    engine.step()
    engine.zero_grad()


def bytes_by_phase(stage: int, precision: str = "bf16") -> dict[str, float]:
    """Bytes beyond the weights, divided by the active block's (padded) values on this rank, by phase of a step."""
    model = block_cases.build(dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    before = live_bytes()
    wrapped = block_cases.wrap(model, block={"switch_block_every": 3})
    booster = Booster(plugin=LowLevelZeroPlugin(stage=stage, precision=precision))
    with PeakBytes() as boosting:
        model, engine, *_ = booster.boost(model, wrapped)
    sizes = [master.numel() for master in engine.masters.of.values()]
    active, whole = sum(sizes), sum(param.numel() for param in engine.masters.of)
    phases = {"boost peak": float(boosting.peak)}
    advance(model, engine, booster, 0)
    phases["between steps"] = live_bytes() - before
    engine.optim.base_optimizer.register_step_pre_hook(
        lambda *_: phases.update({"in step": live_bytes() - before}) or None
    )
    booster.backward(models.loss(model, block_cases.batch_of(1, dist.get_rank(), different=True)), engine)
    phases["after backward"] = live_bytes() - before
    engine.step()
    engine.zero_grad()
    make_master = engine.masters.make_master

    def watched(param: Any) -> Any:
        phases.setdefault("before new masters", live_bytes() - before)
        return make_master(param)

    engine.masters.make_master = watched
    advance(model, engine, booster, 2)
    phases["after switch"] = live_bytes() - before
    guess = estimate(engine)
    phases |= {f"estimate {name}": getattr(guess, name) for name in ("between_steps", "after_backward", "in_step")}
    phases["estimate temporaries"] = guess.temporaries
    return {"active": active, "whole": whole, "largest": max(sizes), **phases}


def collectives(stage: int) -> list[dict[str, Any]]:
    """Calls and bytes of each step (backward included) over one switch."""
    model, engine, booster = block_cases.boosted("zero", {"stage": stage, "precision": "bf16"})
    counts = []
    for step in range(PERIOD + 1):
        values = sum(param.numel() for param in engine.masters.of)
        with CollectiveCounter() as counter:
            advance(model, engine, booster, step)
        counts.append({"calls": dict(counter.calls), "bytes": dict(counter.bytes), "values": values})
    return counts


def layers_reached_by_backward() -> list[list[int]]:
    """Layers that run a backward pass, by active block."""
    model, engine, booster = block_cases.boosted("zero", {"stage": 2, "precision": "bf16"})
    reached: set[int] = set()
    for index, layer in enumerate(model.module.model.layers):
        layer.register_full_backward_hook(lambda *_, index=index: reached.add(index))
    seen = []
    for step in range(PERIOD * LAYERS):
        reached.clear()
        advance(model, engine, booster, step)
        seen.append(sorted(reached))
    return seen[::PERIOD]


def overflow(stage: int) -> dict[str, Any]:
    """fp16 training in which one rank alone overflows at step 1."""
    options = {"stage": stage, "precision": "fp16", "initial_scale": 2.0**8, "hysteresis": 1}
    model, engine, booster = block_cases.boosted("zero", options, model=block_cases.build(dtype=torch.float16))
    steps, scales, blocks = [], [], []
    for step in range(2 * PERIOD + 1):
        blocks.append(engine.optim.active_blocks()[0].name)
        before = [param.detach().clone() for param in engine.masters.of]
        loss = models.loss(model, block_cases.batch_of(step, dist.get_rank(), different=True))
        if step == 1 and dist.get_rank() == 1:
            loss = loss * float("inf")
        booster.backward(loss, engine)
        held = list(engine.masters.of)
        engine.step()
        engine.zero_grad()
        if step == 1:
            unchanged = all(torch.equal(old, new) for old, new in zip(before, held, strict=True))
        steps.append(engine.optim.num_steps)
        scales.append(engine.mixed_precision_mixin.loss_scale)
    finite = all(bool(param.isfinite().all()) for param in model.parameters())
    return {
        "steps": steps,
        "scales": scales[:2],
        "blocks": blocks,
        "unchanged": unchanged,
        "finite": finite,
        "norm": engine.get_grad_norm(),
    }


def frozen_by_user() -> bool:
    """A parameter that the user froze is still frozen, and as it was, after a pass over all blocks."""
    model = block_cases.build()
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = frozen.detach().clone()
    model, engine, booster = block_cases.boosted("zero", {"stage": 2, "precision": "bf16"}, model=model)
    for step in range(PERIOD * LAYERS):
        advance(model, engine, booster, step)
    return torch.equal(frozen, before) and not frozen.requires_grad


def groups_and_scheduler(steps: int) -> list[float]:
    """Losses with two param groups and a scheduler that was made before boosting."""
    model = block_cases.build()
    base = torch.optim.AdamW(two_groups(list(model.parameters())), lr=1e-3)
    wrapped = BlockOptimizer(
        base_optimizer=base,
        named_parameters_list=model.named_parameters(),
        switch_block_every=PERIOD,
        switch_mode="ascending",
        verbose=0,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapped, decay)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    model, engine, _, _, scheduler = booster.boost(model, wrapped, lr_scheduler=scheduler)
    losses = []
    for step in range(steps):
        loss = models.loss(model, block_cases.batch_of(step, 0, different=True))
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


def two_groups(params: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in params if p.dim() > 1], "lr": 1e-3, "weight_decay": 0.5},
        {"params": [p for p in params if p.dim() <= 1], "lr": 1e-2, "weight_decay": 0.0},
    ]


def decay(step: int) -> float:
    return 0.8**step


def disagreement(when: str) -> str:
    """The error that this rank gets when rank 1 has another schedule."""
    seed = {"switch_mode": "random", "seed": dist.get_rank() if when == "boost" else 0}
    try:
        model, engine, booster = block_cases.boosted("zero", {"stage": 2, "precision": "bf16"}, block=seed)
        if dist.get_rank() == 1:
            other = dataclasses.replace(engine.optim.schedule, seed=9)
            engine.optim.plan = dataclasses.replace(engine.optim.plan, schedule=other)
        for step in range(PERIOD):
            advance(model, engine, booster, step)
    except ValueError as error:
        return str(error)
    return "no error"


def lora(stage: int) -> dict[str, Any]:
    """Adapters made by the booster: each block trains its own, and nothing else moves."""
    from peft import LoraConfig

    model = block_cases.build()
    booster = Booster(plugin=LowLevelZeroPlugin(stage=stage, precision="bf16"))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = booster.enable_lora(model, lora_config=config)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    wrapped = BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        named_parameters_list=model.named_parameters(),
        switch_block_every=PERIOD,
        switch_mode="ascending",
        verbose=0,
    )
    model, engine, *_ = booster.boost(model, wrapped)
    for step in range(PERIOD * 2):
        advance(model, engine, booster, step)
    after = dict(model.unwrap(unwrap_peft=False).named_parameters())
    moved = {name for name, old in before.items() if not torch.equal(old, after[name].to(old.dtype))}
    return {"blocks": len(wrapped.blocks), "moved": sorted(moved)}


def files_of_a_step() -> list[str]:
    """The package's files that run between the call of backward and the end of the step, within a block's period.

    The base optimizer is this package's AdamW on bfloat16 weights under stage 2.
    """
    model = block_cases.build(dtype=torch.bfloat16)
    base = colossal_bcd.AdamW(model.parameters(), lr=1e-2)
    prefixes = [[f"model.layers.{index}."] for index in range(LAYERS)]
    wrapped = BlockOptimizer(base, list(model.named_parameters()), block_prefix_list=prefixes, switch_block_every=9)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    model, engine, *_ = booster.boost(model, wrapped)
    advance(model, engine, booster, 0)
    loss = models.loss(model, block_cases.batch_of(1, dist.get_rank(), different=True))
    root, seen = str(Path(colossal_bcd.__file__).parent), set[str]()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            seen.add(frame.f_code.co_filename.removeprefix(root + "/"))

    # On a CPU autograd runs in the thread that calls backward.
    sys.setprofile(note)
    try:
        booster.backward(loss, engine)
        engine.step()
    finally:
        sys.setprofile(None)
    return sorted(seen)
