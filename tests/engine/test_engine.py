"""What the engine holds, sends and skips under block coordinate descent."""

from __future__ import annotations

import block_cases
import engine_cases
import models
import plain_badam
import pytest
import torch
from block_cases import LAYERS, PERIOD

from colossal_bcd.testing import run_ranks

SLACK = 2048  # token ids, losses and the step counters of torch's AdamW, in bytes


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_engine_bytes_equal_the_formula(stage: int, num_ranks: int) -> None:
    """Weights aside: 4 for the master, 8 for the moments, 4 for the float32 gradient, per active value on this rank."""
    for phases in run_ranks(num_ranks, engine_cases.bytes_by_phase, stage):
        active, whole = phases["active"], phases["whole"]
        low_precision = 2 * (whole if stage == 1 else active)
        assert abs(phases["between steps"] - 12 * active) <= SLACK
        assert abs(phases["after backward"] - 12 * active - low_precision) <= SLACK
        assert abs(phases["in step"] - 16 * active) <= SLACK
        for name in ("between_steps", "after_backward"):
            assert abs(phases[f"estimate {name}"] - phases[name.replace("_", " ")]) <= SLACK
        assert abs(phases["estimate in_step"] - phases["estimate temporaries"] - phases["in step"]) <= SLACK
        assert phases["before new masters"] <= SLACK, "something of the old block is alive while the new one is made"
        assert abs(phases["after switch"] - 4 * active) <= SLACK


def test_engine_float32_gradient_parts_do_not_keep_whole_gradients() -> None:
    """A rank's part of a float32 gradient was a view, and every whole gradient lived through the step."""
    for phases in run_ranks(2, engine_cases.bytes_by_phase, 1, "fp32"):
        assert abs(phases["in step"] - 16 * phases["active"]) <= SLACK


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_engine_boosting_allocates_masters_of_one_block(num_ranks: int) -> None:
    for phases in run_ranks(num_ranks, engine_cases.bytes_by_phase, 2):
        assert phases["boost peak"] <= 4 * phases["active"] + 4 * phases["largest"] + SLACK


@pytest.mark.parametrize("stage", [1, 2])
def test_engine_sends_the_active_block_only(stage: int) -> None:
    """A switch costs one all-reduce of a few integers; between switches nothing is added."""
    reduction = "all_reduce" if stage == 1 else "reduce_scatter_tensor"
    for counts in run_ranks(2, engine_cases.collectives, stage):
        plain = {"all_reduce": 1, "all_gather_into_tensor": 1}
        plain[reduction] = plain.get(reduction, 0) + 1
        switching = {**plain, "all_reduce": plain["all_reduce"] + 1}
        assert [count["calls"] for count in counts] == [*[plain] * (PERIOD - 1), switching, plain]
        for count in counts:
            assert count["bytes"]["all_gather_into_tensor"] == 2 * count["values"]
            gradients = count["bytes"][reduction]
            assert 2 * count["values"] <= gradients <= 2 * count["values"] + 256


def test_engine_runs_no_backward_below_the_active_block() -> None:
    want = [list(range(active, LAYERS)) for active in range(LAYERS)]
    assert run_ranks(2, engine_cases.layers_reached_by_backward) == [want, want]


@pytest.mark.parametrize("stage", [1, 2])
def test_engine_overflow_on_one_rank_skips_the_step_on_all(stage: int) -> None:
    first, second = run_ranks(2, engine_cases.overflow, stage)
    assert first == second
    assert first["unchanged"]
    assert first["finite"]
    assert first["steps"] == [1, 1, *range(2, 2 * PERIOD + 1)], "a skipped step must not count"
    assert first["scales"] == [2.0**8, 2.0**7]
    switches = [i for i in range(1, 2 * PERIOD + 1) if first["blocks"][i] != first["blocks"][i - 1]]
    assert switches == [PERIOD + 1], "the skipped step must not count towards the switch"
    assert first["norm"] < 10, "the norm must not contain the loss scale"


def test_engine_keeps_user_frozen_parameters_frozen() -> None:
    assert run_ranks(2, engine_cases.frozen_by_user) == [True, True]


def test_engine_groups_and_scheduler_equal_loop() -> None:
    """Weight decay and lr are per group, and a scheduler made before boosting acts on them."""
    steps = PERIOD * (LAYERS + 1)
    schedulers: list[torch.optim.lr_scheduler.LambdaLR] = []

    def make_optimizer(masters: list[torch.Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(engine_cases.two_groups(masters), lr=1e-3)
        passed = PERIOD * len(schedulers)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, engine_cases.decay, passed - 1))
        optimizer.register_step_post_hook(lambda *_: schedulers[-1].step())
        return optimizer

    want = plain_badam.train(
        block_cases.build(),
        [f"model.layers.{i}." for i in range(LAYERS)],
        [i % LAYERS for i in range(LAYERS + 1)],
        PERIOD,
        lambda step: [block_cases.batch_of(step, 0, different=True)],
        make_optimizer,
        models.loss,
    )
    flat = [losses[0] for losses in want]
    assert run_ranks(1, engine_cases.groups_and_scheduler, steps) == [flat]
    assert run_ranks(2, engine_cases.groups_and_scheduler, steps) == [flat, flat]


@pytest.mark.parametrize("when", ["boost", "switch"])
def test_engine_disagreement_is_one_error_on_all_ranks(when: str) -> None:
    errors = run_ranks(3, engine_cases.disagreement, when)
    assert len(set(errors)) == 1
    expected = {
        "boost": "boost: the block schedule of ranks [1, 2] differs from that of rank 0: seed 1 instead of 0.",
        "switch": "block schedule: ranks [1] differ from rank 0",
    }
    assert errors[0].startswith(expected[when])


@pytest.mark.parametrize("stage", [1, 2])
def test_engine_trains_the_adapters_of_the_active_block(stage: int) -> None:
    for result in run_ranks(2, engine_cases.lora, stage):
        assert result["blocks"] == LAYERS
        assert result["moved"] == sorted(
            f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.default.weight"
            for layer in range(2)
            for name in ("q_proj", "v_proj")
            for side in "AB"
        )


def test_engine_journey_of_a_gradient_is_short() -> None:
    """From backward through the hooks and the step to the weight: each file is one that a newcomer has to open."""
    for files in run_ranks(2, engine_cases.files_of_a_step):
        assert "engine/reducer.py" in files
        assert "optim/adamw.py" in files
        assert len([name for name in files if name.startswith(("engine/", "booster/"))]) <= 8, files
        assert len(files) <= 30, files
