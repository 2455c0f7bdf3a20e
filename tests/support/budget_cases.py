"""What ranks of test_estimates.py run: the bytes and collectives that `colossal-bcd estimate` says, measured."""

from __future__ import annotations

import gc
from typing import Any

import models
import torch
import torch.distributed as dist

from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin
from colossal_bcd.cli.budget import Job
from colossal_bcd.cli.meshes import MeshSize
from colossal_bcd.cli.models import read_model
from colossal_bcd.cli.optimizers import choices
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
MESHES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "zero1": {"gpus": 2, "zero": 1},
    "zero2": {"gpus": 2, "zero": 2},
    "tp2": {"gpus": 2, "tp": 2},
    "fsdp2": {"gpus": 2, "sharded_weights": True},
}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    f"{mesh}, {name}": (name, MESHES[mesh], name in ("badam", "galore", "came"))
    for mesh in MESHES
    for name in choices()
    if (mesh, name) != ("tp2", "lora")  # refused
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
    model, optimizer = job.ready(model)
    plugin: Any = LowLevelZeroPlugin(stage=max(job.mesh.zero, 1), precision="bf16")
    if job.mesh.sharded_weights:
        plugin = FSDP2Plugin(precision="bf16")
    elif job.mesh.tp > 1:
        plugin = HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=0, precision="bf16")
    model, engine, *_ = plugin.configure(model, optimizer)
    # ColossalAI's random states of every dropout.
    before += sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.dtype == torch.uint8)
    peaks: dict[str, Any] = {}
    # At the second step GaLore's bases move into stacks, and what the reducer knows of them does at the third.
    for step in range(3 if job.optimizer == "galore" else 2):
        tokens = models.tokens(dist.get_rank() + 2 * step, 2, 32, 250)
        resting = live_bytes()
        with CollectiveCounter() as sent, PeakBytes() as alive:
            engine.backward(models.loss(model, tokens))
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
