"""accelerate and Hugging Face's Trainer on several processes, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import replica_cases as cases
import replica_trainer_cases as trainer_cases
import torch
import trainer_two_processes
import transformers
from test_replicas import SIGNS, compare
from test_trainer import ACCUMULATION, STEPS, block_optimizer
from torch import nn

from colossal_bcd.testing import run_ranks

ACCELERATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blocks": ({}, {"accumulate": 1, "clip": 0.05, "unwrapped": False}),
    "micro-batches": ({"active_modules": ["lm_head."]}, {"accumulate": 2, "clip": 0.05, "unwrapped": False}),
    "prepared apart": ({"switch_mode": "random"}, {"accumulate": 2, "clip": 0.05, "unwrapped": True}),
    "corrected": ({**SIGNS, "accumulation_steps": 2}, {"accumulate": 2, "clip": 0.05, "unwrapped": False}),
    "ratio": ({"ratio": True, "dense_gradients": True}, {"accumulate": 2, "clip": 0.05, "unwrapped": False}),
}


def test_accelerate_equals_one_process() -> None:
    results = run_ranks(2, trainer_cases.many_accelerated, ACCELERATED)
    for name, (options, how) in ACCELERATED.items():
        want = cases.whole(2, options, accumulate=how["accumulate"], clip=how["clip"])
        for result in results:
            compare(result[name]["weights"], want, 1e-12)


def test_trainer_on_two_processes_resumes_bit_for_bit_and_equals_one(tmp_path: Path) -> None:
    results = run_ranks(2, trainer_cases.trained_and_resumed, str(tmp_path))
    for name, (whole, again) in results[0].items():
        other, other_again = results[1][name]
        compare(other["weights"], whole["weights"], 0)
        compare(again["weights"], whole["weights"], 0)
        compare(other_again["weights"], whole["weights"], 0)
    whole, checkpointed = results[0]["float32"][0], results[0]["checkpointing"][0]
    compare(checkpointed["weights"], whole["weights"], 0)
    compare(whole["weights"], plain([result["float32"][0]["batches"] for result in results]), 2e-4)


def plain(batches: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A loop over the batches of all ranks; for the bound see `test_trainer_equals_a_plain_loop`."""
    model: Any = models.llama()
    optimizer = block_optimizer(model)
    factors = [min(step / 2, (STEPS - step) / (STEPS - 2)) for step in range(STEPS)]
    assert [len(each) for each in batches] == [STEPS * ACCUMULATION] * len(batches)
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            for mine in batches:
                batch = mine[step * ACCUMULATION + micro]
                # Trainers before transformers 5 count the first label of each row, too, which has no loss.
                counted = batch.shape[1] - (int(transformers.__version__.partition(".")[0]) >= 5)
                share = (batch.shape[1] - 1) / counted / ACCUMULATION / len(batches)
                (model(input_ids=batch, labels=batch).loss * share).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factors[step]
        optimizer.step()
        model.zero_grad()
    return cases.weights(model)


def example(folder: str) -> list[float]:
    trainer_cases.launched()
    trainer = trainer_two_processes.train(Path(folder), steps=40)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("world", [2])
def test_example_learns_on_two_processes(world: int, tmp_path: Path) -> None:
    losses = run_ranks(world, example, str(tmp_path))
    assert losses[0][-1] < losses[0][0] - 0.5
