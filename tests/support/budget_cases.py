"""What ranks of test_estimates.py run: the bytes and collectives that `colossal-bcd estimate` says, measured."""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.distributed as dist

from colossal_bcd import fsdp
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin
from colossal_bcd.cli.budget import Job
from colossal_bcd.cli.meshes import MeshSize
from colossal_bcd.cli.models import read_model
from colossal_bcd.testing import CollectiveCounter, PeakBytes, live_bytes

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 250,
}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "one rank, adamw": ("adamw", {}, False),
    "one rank, badam": ("badam", {}, True),
    "one rank, galore": ("galore", {}, True),
    "zero1, lamb": ("lamb", {"gpus": 2, "zero": 1}, False),
    "zero2, came": ("came", {"gpus": 2, "zero": 2}, True),
    "zero2, badam": ("badam", {"gpus": 2, "zero": 2}, False),
    "zero2, galore": ("galore", {"gpus": 2, "zero": 2}, True),
    "tp2, adafactor": ("adafactor", {"gpus": 2, "tp": 2}, False),
    "fsdp2, badam": ("badam", {"gpus": 2, "sharded_weights": True}, True),
}
"""Optimizer, mesh, gradient checkpointing."""


def job_of(case: str) -> Job:
    optimizer, mesh, checkpointing = CASES[case]
    small = read_model("llama-3-8b").changed(**SMALL)
    return Job(
        model=small, optimizer=optimizer, rank=8, mesh=MeshSize(**mesh), batch=2, length=32, checkpointing=checkpointing
    )


def measured(case: str) -> dict[str, Any]:
    """Largest bytes of a backward pass and of a step, all of the rank's tensors; collectives of both."""
    job = job_of(case)
    torch.manual_seed(0)
    before = live_bytes()
    model = job.model.build(job.dtype)
    if job.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine: Any
    if job.mesh.sharded_weights:
        fsdp.shard(model)
        model, optimizer = job.ready(model)
        fsdp.attach(model, optimizer)
        engine = optimizer
    else:
        model, optimizer = job.ready(model)
        if job.mesh.tp > 1:
            plugin: Any = HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=0, precision="bf16")
        else:
            plugin = LowLevelZeroPlugin(stage=max(job.mesh.zero, 1), precision="bf16")
        model, engine, *_ = plugin.configure(model, optimizer)
    peaks: dict[str, Any] = {}
    # At the second step GaLore's bases move into stacks, and what the reducer knows of them does at the third.
    for step in range(3 if job.optimizer == "galore" else 2):
        tokens = models.tokens(dist.get_rank() + 2 * step, 2, 32, 250)
        resting = live_bytes()
        with CollectiveCounter() as sent, PeakBytes() as alive:
            loss = models.loss(model, tokens)
            (loss if job.mesh.sharded_weights else engine).backward(*(() if job.mesh.sharded_weights else (loss,)))
            del loss
        passes = [resting + alive.peak - before]
        peaks["reduced"] = dict(sent.calls), dict(sent.bytes)
        resting = live_bytes()
        with CollectiveCounter() as sent, PeakBytes() as alive:
            engine.step()
        peaks["step"] = resting + alive.peak - before
        peaks["stepped"] = dict(sent.calls), dict(sent.bytes)
        engine.zero_grad()
    if job.optimizer == "galore":
        # The estimate is of a refresh, for which whole gradients travel.
        for group in optimizer.param_groups:
            group["update_proj_gap"] = 1
        resting = live_bytes()
        with PeakBytes() as alive:
            engine.backward(models.loss(model, models.tokens(dist.get_rank(), 2, 32, 250)))
        passes.append(resting + alive.peak - before)
    peaks["passes"] = max(passes)
    return peaks
