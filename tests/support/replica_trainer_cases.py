"""What ranks run in test_replica_trainers.py: accelerate and Hugging Face's Trainer on several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import models
import replica_cases as cases
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from test_trainer import Order, block_optimizer, trainer_of
from torch import Tensor

from colossal_bcd import BlockOptimizerRatio
from colossal_bcd.compat import BAdamCallback


def launched() -> None:
    """What torchrun says besides; nothing connects to it, as there is a process group already."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def accelerated(optimizer_options: dict[str, Any], *, accumulate: int, clip: float, unwrapped: bool) -> dict[str, Any]:
    """Weights after a loop as accelerate's documentation has it."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    inner = cases.Net()
    optimizer: Any = cases.wrap(inner, **optimizer_options)
    if unwrapped:
        model = accelerator.prepare(inner)
        optimizer = accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(inner, optimizer)
    rank = dist.get_rank()
    for step in range(cases.STEPS):
        for micro in range(accumulate):
            with accelerator.accumulate(model):
                accelerator.backward(model(cases.batch(step, rank * accumulate + micro))["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return {"weights": cases.weights(inner)}


def many_accelerated(table: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    launched()
    return {name: accelerated(options, **how) for name, (options, how) in table.items()}


def trained(
    folder: str, dtype: torch.dtype, *, seed: int = 0, resume: bool = False, ratio: bool = False, **options: Any
) -> dict[str, Any]:
    """Weights, batches and number of switches of a Trainer; with `resume` from its fourth step on."""
    model: Any = models.llama(seed=seed).to(dtype)
    if ratio:
        optimizer: Any = BlockOptimizerRatio(
            [{"params": list(model.parameters())}], list(model.named_parameters()), 0.3, switch_every=3, lr=1e-2,
            mask_mode="scatter", verbose=0,
        )  # fmt: skip
        options["max_grad_norm"] = 0
    else:
        optimizer = block_optimizer(model)
    order = Order(model)
    trainer = trainer_of(model, optimizer, Path(folder), callbacks=(BAdamCallback, order), **options)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4" if resume else None)
    found: dict[str, Tensor] = cases.weights(model)
    return {"weights": found, "batches": order.batches}


def trained_and_resumed(folder: str) -> dict[str, Any]:
    """Runs as a whole, and from their fourth step on with other weights at first."""
    launched()
    results = {}
    for name, options in {
        "float32": {"dtype": torch.float32},
        "bfloat16": {"dtype": torch.bfloat16},
        "ratio": {"dtype": torch.float32, "ratio": True},
        "checkpointing": {"dtype": torch.float32, "gradient_checkpointing": True},
    }.items():
        path = f"{folder}/{name}"
        whole = trained(path, **options)
        again = trained(path, seed=9, resume=True, **options)
        results[name] = whole, again
    return results
