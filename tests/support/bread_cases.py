"""What ranks run in test_correction_plugins.py: BREAD under the real plugins."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import block_cases
import models
import torch
import torch.distributed as dist
from bread_rules import RULES
from on_ranks import equal_on_ranks, message_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_bcd.testing import CollectiveCounter, PeakBytes, live_bytes
from support.errors import largest_error, worst


def options_of(rule: str, **options: Any) -> dict[str, Any]:
    return {"sgd_mode": "all", "sgd_lr_scaling": 2.0, "correction": RULES[rule], **options}


def replicas_equal(engine: Any) -> bool:
    """Whether every parameter is bitwise equal on all ranks that hold the same part of it."""
    undivided = [param for param, layout in engine.layouts.items() if layout.split is None]
    pairs = [*((engine.layouts, group) for group in engine.config.data_groups)]
    pairs += [] if engine.tp_pg is None else [(undivided, engine.tp_pg)]
    return min([equal_on_ranks(params, group) for params, group in pairs], default=True)


def losses(
    plugin: str, options: dict[str, Any], steps: int, different: bool, base: str = "adamw", **kwargs: Any
) -> Any:
    """`block_cases.losses`, and whether the replicas are equal at the end."""
    engines: list[Any] = []
    boosted = block_cases.boosted

    def catch(*args: Any, **keywords: Any) -> Any:
        result = boosted(*args, **keywords)
        engines.append(result[1])
        return result

    block_cases.boosted = catch
    try:
        result = block_cases.losses(plugin, options, steps, different, base, **kwargs)
    finally:
        block_cases.boosted = boosted
    return {**result, "replicas": replicas_equal(engines[0])}


def pipeline(options: dict[str, Any], steps: int, layers: int, **kwargs: Any) -> dict[str, Any]:
    return block_cases.pipeline_losses(options, steps, layers, **kwargs)


def step_once(model: Any, engine: Any, booster: Any, batches: Sequence[Tensor], no_sync: bool = False) -> None:
    for index, batch in enumerate(batches):
        inner = no_sync and index < len(batches) - 1
        with booster.no_sync(model, engine) if inner else contextlib.nullcontext():
            booster.backward(models.loss(model, batch) / len(batches), engine)
    engine.step()
    engine.zero_grad()


def overflow(plugin: str, options: dict[str, Any], bad_tp_rank: int | None, rule: str = "sign") -> dict[str, Any]:
    """A step in which one corrected gradient is infinite on one rank: what moved, and the loss scale."""
    model, engine, booster = block_cases.boosted(
        plugin, options, base="sgd", model=block_cases.build(dtype=torch.float16), block=options_of(rule)
    )
    names = {id(param): name for name, param in engine.optim.named_parameters.items()}
    bad = next(param for param in engine.layouts if "layers.2.mlp.down_proj" in names[id(param)])
    where = dist.get_rank() if bad_tp_rank is None else dist.get_rank(engine.tp_pg)
    if where == (bad_tp_rank or 0):
        bad.register_hook(lambda grad: torch.full_like(grad, torch.inf))
    before = {param: param.detach().clone() for param in engine.layouts}
    scale = engine.mixed_precision_mixin.loss_scale
    booster.backward(models.loss(model, models.tokens(dist.get_rank(engine.config.data_groups[0]))), engine)
    engine.step()
    moved = {names[id(param)] for param in engine.layouts if not torch.equal(param, before[param])}
    finite = all(bool(param.isfinite().all()) for param in engine.layouts)
    return {
        "moved": moved,
        "active": set(engine.optim.active_names()),
        "bad": names[id(bad)],
        "finite": finite,
        "steps": engine.optim.num_steps,
        "scale": engine.mixed_precision_mixin.loss_scale / scale,
        "replicas": replicas_equal(engine),
    }


def scaled(options: dict[str, Any], rule: str) -> float:
    """Largest difference of corrected float16 weights from those by the gradient without loss scale."""
    model, engine, booster = block_cases.boosted(
        "zero", options, base="sgd", model=block_cases.build(dtype=torch.float16), block=options_of(rule)
    )
    plain = block_cases.build(dtype=torch.float16)
    (models.loss(plain, models.tokens(0)) * engine.mixed_precision_mixin.loss_scale).backward()
    scale = engine.mixed_precision_mixin.loss_scale
    step_once(model, engine, booster, [models.tokens(0)])
    errors = []
    for name, mine in model.unwrap(unwrap_peft=False).named_parameters():
        if name in engine.optim.corrected_names():
            theirs = plain.get_parameter(name)
            want = (theirs.float() - 0.1 * theirs.grad.float() / scale).half()
            errors.append(largest_error(mine, want))
    return worst(errors)


def traffic(options: dict[str, Any], block: dict[str, Any], width: int = 64) -> dict[str, Any]:
    """Collectives of a step, its peak bytes, the model's weights included, and how many gradients are left."""
    model = block_cases.build() if width == 64 else wide_llama(width).bfloat16()
    model, engine, booster = block_cases.boosted("zero", options, model=model, block=block)
    batch = models.tokens(dist.get_rank(), batch=1, length=2)
    step_once(model, engine, booster, [batch])
    with CollectiveCounter() as counter:
        step_once(model, engine, booster, [batch])
    resting = live_bytes()
    with PeakBytes() as alive:
        step_once(model, engine, booster, [batch])
    return {"calls": dict(counter.calls), "peak": resting + alive.peak}


def calls(options: dict[str, Any], rule: str) -> list[int]:
    """Collectives of a step between refreshes of the bases, and of one with a refresh."""
    block = options_of(rule, switch_mode="fixed")
    model, engine, booster = block_cases.boosted("hybrid", options, model=block_cases.build(torch.float32), block=block)
    totals = []
    for step in range(4):
        with CollectiveCounter() as counter:
            step_once(model, engine, booster, [models.tokens(step)])
        totals.append(counter.total)
    return totals[2:]


def wide_llama(width: int) -> torch.nn.Module:
    """Eight layers whose weights outweigh a few buckets."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=64,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def missing_gradients(stage: int) -> bool:
    """Ranks that use different layers of a step neither hang nor diverge."""
    model, engine, booster = block_cases.boosted(
        "zero", {"stage": stage, "precision": "bf16", "reduce_bucket_size_in_m": 0}, block=options_of("sgd")
    )
    layers = model.unwrap(unwrap_peft=False).model.layers
    all_layers = list(layers)
    for step in range(4):
        skipped = (dist.get_rank() + step) % len(all_layers)
        model.unwrap(unwrap_peft=False).model.layers = torch.nn.ModuleList(
            layer for index, layer in enumerate(all_layers) if index != skipped
        )
        step_once(model, engine, booster, [models.tokens(step)])
    return replicas_equal(engine)


def refused_second_backward(stage: int) -> str:
    model, engine, booster = block_cases.boosted("zero", {"stage": stage, "precision": "bf16"}, block=options_of("sgd"))
    booster.backward(models.loss(model, models.tokens(0)), engine)
    try:
        booster.backward(models.loss(model, models.tokens(1)), engine)
    except ValueError as error:
        engine.zero_grad()
        step_once(model, engine, booster, [models.tokens(2)])
        return str(error)
    return ""


def refused_sequence_parallelism(mode: str) -> str:
    """What boosting says where gradients are parts of a sum within backward."""
    options = {"tp_size": 2, "pp_size": 1, "zero_stage": 0, "precision": "fp32"}
    options |= {"enable_sequence_parallelism": True, "sequence_parallelism_mode": "split_gather"}
    return message_of(
        lambda: block_cases.boosted(
            "hybrid", options, model=block_cases.build(dtype=torch.float32), block={"sgd_mode": mode}
        )
    )


def partial_accumulation(stage: int) -> float:
    """Two of four declared micro-batches: the step makes the update; difference from two declared ones."""
    weights = []
    for declared in (2, 4):
        torch.manual_seed(0)
        model, engine, booster = block_cases.boosted(
            "zero",
            {"stage": stage, "precision": "fp32"},
            base="sgd",
            model=block_cases.build(dtype=torch.float32),
            block=options_of("sgd", accumulation_steps=declared),
        )
        step_once(model, engine, booster, [models.tokens(dist.get_rank()), models.tokens(5 + dist.get_rank())])
        weights.append([copy.deepcopy(param.detach()) for param in model.parameters()])
    return largest_error(*weights)
