"""Uses of the engine that were once silently wrong, or hung one rank; each test tells its story."""

from __future__ import annotations

from pathlib import Path

import engine_guard_cases as cases
import pytest

from colossal_bcd.testing import run_ranks


@pytest.mark.parametrize("plugin", ["zero", "hybrid", "ddp"])
def test_engine_follows_a_loaded_model(plugin: str, tmp_path: Path) -> None:
    """Under DDP masters did not follow, and the next step wrote the old weights back."""
    assert run_ranks(2, cases.loads_weights, plugin, str(tmp_path)) == [True, True]


def test_engine_state_of_plain_optimizers_loads_with_zero_over_one_rank(tmp_path: Path) -> None:
    """ColossalAI flattens the state that it loads under ZeRO; masters over one rank kept their shape."""
    for straight, reloaded in run_ranks(2, cases.plain_optimizer_round_trip, str(tmp_path)):
        assert straight == reloaded


def test_engine_averages_gradients_that_backward_left_behind() -> None:
    """Such a step counted, might switch the block, and changed nothing."""
    for right, no_sync, around in run_ranks(2, cases.never_synchronised):
        assert right == no_sync == around


def test_engine_frees_old_masters_with_an_optimizer_of_this_package() -> None:
    """The optimizer's table of layouts kept the old block's masters alive while the new ones were made."""
    assert all(beyond <= 2048 for beyond in run_ranks(2, cases.lamb_bytes_at_switch))


def test_engine_keeps_no_weights_of_other_pipeline_stages() -> None:
    """BlockOptimizer held every parameter of the model on every stage."""
    with_blocks = run_ranks(2, cases.stage_bytes, True)
    without = run_ranks(2, cases.stage_bytes, False)
    assert all(abs(a - b) <= 2048 for a, b in zip(with_blocks, without, strict=True))


def test_engine_starts_from_the_first_rank_in_what_is_frozen() -> None:
    """What a block optimizer leaves frozen is never gathered, so different ranks stayed different there."""
    assert run_ranks(2, cases.different_frozen_weights) == [True, True]


def test_engine_refuses_clipping_that_would_do_nothing() -> None:
    for by_norm, within, norm_type in run_ranks(1, cases.clipping_calls):
        assert "norm_type=1" in by_norm
        assert "within no_sync" in within
        assert "norm_type=1" in norm_type


def test_engine_failed_boost_freezes_again() -> None:
    assert run_ranks(1, cases.failed_boost) == [True]


@pytest.mark.parametrize("base", ["adamw", "lamb"])
def test_engine_active_modules_survive_switches(base: str) -> None:
    assert run_ranks(2, cases.active_modules, base) == [[True, True, True]] * 2


@pytest.mark.parametrize("plugin", ["zero", "hybrid", "ddp", "fsdp"])
def test_engine_is_not_copied(plugin: str) -> None:
    """A copy failed after torch had wrapped `step` of the class, so that the original could not step any more."""
    for errors in run_ranks(1, cases.copies, plugin):
        assert all("cannot be copied or pickled" in error for error in errors)


@pytest.mark.parametrize("plugin", ["zero", "fsdp"])
def test_engine_loads_into_a_state_that_was_emptied(plugin: str) -> None:
    """torch's tests assign a list to `state` before they load, which ended in an obscure TypeError under FSDP2."""
    assert run_ranks(2, cases.emptied_state, plugin) == [True, True]
