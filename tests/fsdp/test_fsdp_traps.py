"""What FSDP2 does by itself that would train blocks wrongly, or cost what blocks save; one test for each."""

from __future__ import annotations

from typing import Any

import fsdp_trap_cases as cases
import pytest
import torch
from fsdp_block_cases import LAYERS, PERIOD

from colossal_bcd.fsdp.torch_private import VERSION
from colossal_bcd.testing import run_ranks

NAMES = (
    "mixed_precision",
    "gathers",
    "stale",
    "made_before_sharding",
    "rounded_gradients",
    "attached_after_evaluation",
    "replaced",
    "moved",
    "written",
    "disagreeing",
    "pinned",
    "embeddings_output_needs_no_gradient",
    "norms",
    "tied_groups",
    "guards",
    "not_finite",
    "bread_bytes",
    "used_up",
)


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """Results by name, of each rank."""
    return [dict(zip(NAMES, each, strict=True)) for each in run_ranks(2, cases.many, *NAMES)]


def test_dtypes_of_gradients_are_those_of_what_trains_now(found: Any) -> None:
    """torch 2.13 takes them from what requires grad at the first forward pass: gradients were bfloat16, or an error."""
    for each in found:
        assert each["mixed_precision"] == {"equal": True, "dtypes": ["torch.float32"]}


def test_backward_gathers_nothing_below_what_trains_and_reduces_the_block_alone(found: Any) -> None:
    """Groups: embedding, layers, head, and the norm with what is left, which stays gathered until backward ends."""
    for each in found:
        for step, counted in enumerate(each["gathers"]):
            block = step // PERIOD
            switch = (step + 1) % PERIOD == 0
            above = LAYERS + 2 - block
            forward, backward, stepping = ({kind(name): n for name, n in calls.items()} for calls in counted["calls"])
            assert forward == {"gather": LAYERS + 3}
            assert backward == {"gather": above, "reduce_scatter": 1}
            assert stepping == {"all_reduce": 1 + switch}
            assert counted["waiting"] == 0


def kind(name: str) -> str:
    """torch 2.13 calls collectives by other names than 2.5."""
    return next((short for short in ("gather", "reduce_scatter") if short in name), name)


def test_weights_that_were_gathered_in_vain_are_not_used(found: Any) -> None:
    """torch 2.5 keeps what was gathered below the active block, and the next forward pass computes with it."""
    assert all(each["stale"] for each in found)


def test_an_optimizer_made_before_sharding_finds_the_parameters_or_raises(found: Any) -> None:
    """`fully_shard` makes new Parameter objects, so that the old ones would be trained, and the model not."""
    for each in found:
        unsharded, foreign = each["made_before_sharding"]
        assert "are in no group of fully_shard" in unsharded
        assert "for parameter 'model.layers.3." in foreign


def test_gradients_of_two_passes_add_up_in_the_dtype_of_the_weights(found: Any) -> None:
    """However they are reduced; so docs/fsdp.md says how micro-batches add up in float32."""
    for each in found:
        assert each["rounded_gradients"] == {"dtype": "torch.bfloat16", "equal": True}


def test_an_evaluation_before_the_optimizer_is_made_changes_nothing(found: Any) -> None:
    """It leaves the outermost group gathered, so that `model.parameters()` are plain tensors."""
    assert found[0]["attached_after_evaluation"]["equal"]


def test_weights_that_were_replaced_or_moved_are_followed_or_refused(found: Any) -> None:
    for each in found:
        cloned, converted, assigned = each["replaced"]
        assert cloned == "nothing"
        assert "the model was moved or converted" in converted
        assert "is no longer what FSDP2 gathers" in assigned
        assert each["moved"]
        assert each["written"]


@pytest.mark.parametrize("by", ["gradient", "weight"])
def test_importance_is_measured_over_all_ranks(by: str) -> None:
    """Norms of each rank's rows let ranks draw different blocks, and hang in the first collective."""
    for drawn, want in run_ranks(3, cases.importance, by):
        assert drawn == want


def test_ranks_that_differ_raise_before_they_hang(found: Any) -> None:
    for each in found:
        for message in each["disagreeing"]:
            assert "block schedule: this rank is at" in message
            assert "expected all ranks to agree" in message


def test_corrections_by_gradients_on_their_way_to_pinned_memory_are_refused(found: Any) -> None:
    """torch 2.5 calls hooks before the copy has ended; torch 2.13 waits for it where there are hooks."""
    for each in found:
        late = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
        assert ("CPUOffloadPolicy(pin_memory=True)" in each["pinned"]) == late


def test_embeddings_output_needs_no_gradient_for_checkpoints(found: Any) -> None:
    """transformers 5 asks for one when checkpointing is enabled, and backward then runs through all layers."""
    for each in found:
        assert each["embeddings_output_needs_no_gradient"] == [True, False]


def test_clipping_is_by_the_norm_over_all_ranks(found: Any) -> None:
    """torch 2.5's `clip_grad_norm_` is off by 2e-7 on DTensors."""
    for each in found:
        got, want = each["norms"]
        assert abs(got - want) <= 1e-12 * want


def test_tied_weights_are_one_group_of_the_outermost_module(found: Any) -> None:
    """torch 2.13 refuses one weight in two groups."""
    assert all(each["tied_groups"] == [""] for each in found)


def test_a_gradient_that_only_some_ranks_have_counts_and_one_that_none_has_does_not() -> None:
    """Ranks reduce what they have a gradient of, in one buffer: other weights on each rank, or an error."""
    for errors in run_ranks(2, cases.unused, (2, 1, 0, 2, 1), (0, 1, 2), (1, 0, 0)):
        assert max(errors) <= 1e-12, errors


def test_what_would_train_wrongly_raises_with_the_remedy(found: Any) -> None:
    for each in found:
        forgotten, unattached, plain, norm, again, shard, closure, kept, steps, *others = each["guards"]
        assert "Call colossal_bcd.fsdp.attach(model, optimizer)" in forgotten
        assert "Call colossal_bcd.fsdp.attach(model, optimizer)" in unattached
        assert "expected a BlockOptimizer" in plain
        assert "max_norm=-1.0" in norm
        assert "Attach it once" in again
        assert "Shard it once" in shard
        assert "closure: got one under an engine" in closure
        assert "set_requires_gradient_sync(True)" in kept
        assert "point_to: got it after 1 steps" in steps
        ratio, state, torchs = others
        assert "Use a BlockOptimizer with colossal_bcd.fsdp.attach" in ratio
        assert "colossal_bcd.fsdp.save_optimizer(engine, path)" in state
        assert "colossal_bcd.fsdp.Checkpointable(engine)" in torchs


def test_a_step_after_gradients_that_are_not_finite_raises_on_all_ranks(found: Any) -> None:
    for each in found:
        first, second, _ = each["not_finite"]
        assert first == "nothing"
        assert "the gradients of step 1 were not finite" in second


def test_gradients_that_a_step_has_used_up_are_said_once(found: Any) -> None:
    """Gradients left without `zero_grad` between steps were gone without a word; ranks but the first say nothing."""
    assert [each["used_up"] for each in found] == [[0, 1], [0, 0]]


@pytest.mark.skipif(VERSION < (2, 13), reason="torch.compile does not go with FSDP2 of torch 2.5")
def test_compiled_models_train_all_blocks() -> None:
    for errors in run_ranks(2, cases.compiled):
        assert max(errors) <= 1e-12


def test_gradients_of_corrected_weights_do_not_live_on(found: Any) -> None:
    for each in found:
        left = each["bread_bytes"]
        assert left["sgd"] <= left["none"] + left["all"] / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_by_phase_equal_the_formula(dtype: torch.dtype) -> None:
    """b: values of the active block here.  Masters of float32 weights are the weights; their gradient has no copy."""
    slack = 4096  # token ids, losses and step counters
    for phases in run_ranks(3, cases.bytes_by_phase, dtype):
        b, low = phases["values"], dtype == torch.bfloat16
        assert abs(phases["between steps"] - (12 if low else 8) * b) <= slack
        assert abs(phases["after backward"] - (14 if low else 12) * b) <= 0.02 * 14 * b + slack
        assert abs(phases["in step"] - (16 if low else 12) * b) <= 0.02 * 16 * b + slack
        assert abs(phases["after switch"] - (4 if low else 0) * b) <= slack
