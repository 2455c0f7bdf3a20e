"""Every optimizer of this package over `fully_shard`, made of `model.parameters()` and nothing else."""

import functools

import pytest
from support.fsdp_optimizer_cases import OPTIMIZERS, eight_bits, on_four_ranks, on_three_ranks

from colossal_bcd.testing import run_ranks


@functools.cache
def reports():
    return run_ranks(3, on_three_ranks)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_over_sharded_weights_equal_one_process(name):
    for report in reports():
        # Chunks of 8-bit moments begin where a rank's values begin: after the first step they are rounded apart.
        errors = report["optimizers"][name][:1] if name.endswith("8bit") else report["optimizers"][name]
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("name", ["AdamW", "Lamb", "Lion"])
def test_weights_over_sharded_weights_are_rounded_by_the_bits_of_one_process(name):
    for report in reports():
        # Sums of LAMB's norms end in other bits, which move a value over its threshold once in 2^16 values.
        assert max(report["optimizers"][f"{name} stochastic"]) == 0


@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
def test_training_over_fully_shard_equals_one_process(optimizer):
    assert max(report["training"][optimizer] for report in reports()) <= 1e-12


@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
def test_training_over_replicas_of_shards_equals_one_process(optimizer):
    assert max(report[optimizer] for report in four()) <= 1e-12


@functools.cache
def four():
    return run_ranks(4, on_four_ranks)


@pytest.mark.parametrize("case", ["before fully_shard", "again", "of an unsharded root"])
def test_optimizer_of_parameters_that_left_the_model_is_refused_on_all_ranks(case):
    """`fully_shard` makes new parameters: an optimizer made before trained nothing, silently."""
    assert len({report["early"][case] for report in reports()}) == 1
    message, collectives = reports()[0]["early"][case]
    assert collectives == 0
    assert "number 0 of shape (23, 5)" in message
    assert "embedding.weight" in message
    assert "Call fully_shard first" in message


def test_optimizer_of_the_sharded_model_is_not_refused():
    assert [report["early"]["of the sharded model, with others"] for report in reports()] == [(None, 0)] * 3


@pytest.mark.parametrize("case", ["partial for copies", "partial for rows", "copies for rows"])
def test_gradients_of_other_placements_are_redistributed(case):
    assert max(report["gradients"][case] for report in reports()) <= 1e-15


def test_plain_gradient_of_a_dtensor_is_refused():
    for report in reports():
        message, collectives = report["gradients"]["plain"]
        assert "the gradient of parameter 0: got a plain tensor" in message
        assert "DTensor.from_local" in message
        assert collectives == 0


def test_plain_tensors_dtensors_and_flat_data_train_alike():
    for report in reports():
        assert max(report["parameters"]["errors"]) <= 1e-14


def test_state_is_as_large_as_the_longest_slice():
    for report in reports():
        found, most = report["parameters"]["bytes"]
        assert found == most


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_estimate_counts_this_ranks_part_of_state(name):
    """It counted whole tensors on every rank."""
    for report in reports():
        guess, found = report["bytes"][name]
        assert guess == found


def test_moments_in_8_bits_over_sharded_weights_begin_as_on_one_process():
    # Both compute the first step in float32 before anything is rounded to 8 bits; after that a moment is off by up to
    # 1/2 of the map's widest step, 0.014 of the largest in its chunk, so that no update of lr 1e-2 or 3e-2 is off by
    # more than itself.
    for errors in run_ranks(2, eight_bits):
        assert errors[0] <= 1e-6
        assert max(errors) <= 2 * 3e-2
