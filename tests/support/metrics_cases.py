"""What ranks run in test_metrics.py: steps that are recorded, beside the same steps that are not."""

from __future__ import annotations

import math
from typing import Any

import conformance_cases as conformance
import models
import torch
import torch.distributed as dist
from conformance_cases import CASES, Sizes
from torch import Tensor

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.testing import CollectiveCounter

STEPS = 5


def index_of_key() -> dict[str, int]:
    """Number of the case that each name, a key, stands for."""
    order = [index for group in conformance.groups_of(range(len(CASES)), 0.0) for index in group["params"]]
    return {str(key): index for key, index in enumerate(order)}


def norm(tensor: Tensor) -> float:
    return math.sqrt(tensor.double().square().sum().item())


def recorded(sizes: Sizes, variant: str) -> list[dict[str, Any]]:
    """Metrics after each step, with the collectives and bits of the same step without a recording."""
    run, plain = (conformance.run_of(sizes, variant) for _ in range(2))
    found = []
    for step in range(STEPS):
        with CollectiveCounter() as unrecorded:
            plain.step(step)
        with CollectiveCounter() as with_recording, run.optimizer.recording():
            run.step(step)
        with CollectiveCounter() as asking:
            metrics = run.optimizer.metrics()
        same = all(torch.equal(run.data(index), plain.data(index)) for index in range(len(CASES)))
        assert metrics.step is not None
        found.append(
            {
                "same": same,
                "calls": (unrecorded.total, with_recording.total, asking.total),
                "sent": unrecorded.bytes.total(),
                "bytes_sent": metrics.step.bytes_sent,
                "weight_norms": metrics.weight_norms,
                "gradient_norms": metrics.step.gradient_norms,
                "update_rms": metrics.step.update_rms,
                "trust_ratios": metrics.step.trust_ratios,
                "energy": metrics.projection_energy,
            }
        )
    return found


def many_recorded(sizes: Sizes, variants: list[str]) -> dict[str, list[dict[str, Any]]]:
    return {variant: recorded(sizes, variant) for variant in variants}


def wrapped(model: Any) -> BlockOptimizer:
    base = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    return BlockOptimizer(base, model.named_parameters(), switch_block_every=2, switch_mode="ascending", verbose=0)


def of_blocks(metrics: Any) -> dict[str, Any]:
    return {
        "blocks": metrics.blocks,
        "weight_norms": metrics.weight_norms,
        "step": metrics.step.blocks,
        "gradient_norms": metrics.step.gradient_norms,
        "update_rms": metrics.step.update_rms,
        "scalars": metrics.scalars(),
    }


def boosted_blocks(plugin: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of blocks under a plugin; every data-parallel rank has the same batch."""
    import block_cases
    from colossalai.booster import Booster

    model = models.llama(layers=2)
    optimizer = wrapped(model)
    booster = Booster(plugin=block_cases.PLUGINS[plugin](precision="fp32", **options))
    model, engine, *_ = booster.boost(model, optimizer)
    found = []
    for step in range(4):
        booster.backward(models.loss(model, models.tokens(step)), engine)
        with optimizer.recording():
            engine.step()
        engine.zero_grad()
        found.append(of_blocks(optimizer.metrics()))
    return found


def fsdp_blocks() -> list[dict[str, Any]]:
    """Metrics of blocks on weights that `fully_shard` has sharded, in float64."""
    from fsdp_block_cases import loss_of, mesh_of

    from colossal_bcd import fsdp

    fsdp.enable_cpu()
    model = models.llama(vocab=250, layers=2).double()
    fsdp.shard(model, mesh_of("fsdp"))
    optimizer = wrapped(model)
    fsdp.attach(model, optimizer)
    found = []
    for step in range(4):
        loss_of(model, models.tokens(2 * step + dist.get_rank(), vocab=250)).backward()
        with optimizer.recording():
            optimizer.step()
        optimizer.zero_grad()
        found.append(of_blocks(optimizer.metrics()))
    return found


def projected(gather: bool) -> dict[str, list[Any]]:
    """What is known of projected parameters under ZeRO-2: names by step, and the energies of one."""
    import low_rank_cases as low_rank

    from colossal_bcd.booster import LowRankOptions

    options: dict[str, Any] = {"stage": 2, "precision": "fp32"}
    hyper: dict[str, Any] = {"update_proj_gap": 2}
    if gather:
        options = {"stage": 2, "precision": "bf16", "master_weights": False, "low_rank": LowRankOptions(gather=True)}
        hyper["rounding"] = "stochastic"
    dtype = torch.bfloat16 if gather else torch.float32
    model, engine, booster = low_rank.boosted("zero", options, hyper, dtype=dtype)
    optimizer, found = engine.optim, {"gradients": [], "updates": [], "energies": [], "all": []}
    for step in range(3):
        booster.backward(models.loss(model, models.tokens(step)), engine)
        with optimizer.recording():
            engine.step()
        engine.zero_grad()
        metrics = optimizer.metrics()
        found["all"].append(len(metrics.weight_norms))
        found["gradients"].append(len(metrics.step.gradient_norms))
        found["updates"].append(len(metrics.step.update_rms))
        found["energies"].append(metrics.projection_energy)
        assert all(value > 0 for value in metrics.step.update_rms.values())
    return found
