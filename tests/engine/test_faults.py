"""Ranks that die, stall or differ, and gradients that are not finite: the others end together, and a run goes on."""

from __future__ import annotations

import time
from pathlib import Path

import fault_cases as cases
import pytest

from colossal_bcd.testing import RankError, run_ranks

PLACES = {
    "average": ("zero2 x2", "average of gradients"),
    "rule": ("zero2 x2", "optimizer rule"),
    "gather": ("zero2 x2", "gather of weights"),
    "switch": ("zero2 x2", "switch of blocks"),
    "save": ("zero2 x2", "save of the optimizer"),
    "write": ("zero2 x2", "save of the optimizer"),
    "random": ("zero2 x2", "save of the checkpoint"),
    "forward": ("tp2", "forward"),
}
LIMIT = 60.0
"""Seconds within which the survivors have to end."""


@pytest.mark.parametrize("where", PLACES)
def test_survivors_of_a_killed_rank_name_the_round_and_the_run_goes_on(where: str, tmp_path: Path) -> None:
    mesh, round_name = PLACES[where]
    with pytest.raises(RankError) as error:
        run_ranks(2, cases.killed, where, mesh, str(tmp_path))
    assert time.time() - float((tmp_path / "died").read_text()) < LIMIT
    text = str(error.value)
    victim = int(where != "write")
    assert f"rank {victim}\nthe process ended without a result" in text
    assert f"rank {1 - victim}, {round_name}" in text
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{cases.GOOD:08}"]
    if where in ("rule", "write"):
        straight = run_ranks(2, cases.straight, mesh)
        assert run_ranks(2, cases.go_on, mesh, str(tmp_path)) == [(cases.GOOD, losses) for losses in straight]
        # On a smaller mesh activations are computed alike, and averages of gradients rounded in another order.
        ((step, losses),) = run_ranks(1, cases.go_on, "1 rank", str(tmp_path))
        assert step == cases.GOOD
        assert losses == pytest.approx(straight[0], abs=0.02)


@pytest.mark.parametrize("where", ["forward", "average", "save"])
def test_a_rank_that_stalls_ends_the_others_after_the_time_limit(where: str, tmp_path: Path) -> None:
    """Under ZeRO all ranks communicate in the default group, which was made with a limit of 30 minutes."""
    mesh, round_name = PLACES[where]
    with pytest.raises(RankError) as error:
        run_ranks(2, cases.limited, 8.0, cases.killed, where, mesh, str(tmp_path), cases.stop)
    assert time.time() - float((tmp_path / "died").read_text()) < LIMIT
    assert f"rank 0, {round_name}" in str(error.value)
    assert "COLOSSAL_BCD_TIMEOUT" in str(error.value)


def test_time_limit_holds_for_all_groups_of_the_plugin() -> None:
    for seconds in run_ranks(2, cases.limits, "333"):
        assert len(seconds) > 1
        assert set(seconds) == {333.0}
    for seconds in run_ranks(2, cases.limits, "0"):
        assert min(seconds) > 300


def test_time_limit_does_not_hold_for_ranks_that_wait_for_a_writer(tmp_path: Path) -> None:
    """Large models take longer to write than a collective may take."""
    assert min(run_ranks(2, cases.limited, 4.0, cases.slow_writer, str(tmp_path))) > 9
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_default_group_keeps_its_first_time_limit_and_says_so() -> None:
    for rank, (messages, seconds) in enumerate(run_ranks(2, cases.limits_twice)):
        assert ["keeps its limit of 0:00:02, not 0:00:40" in message for message in messages] == [True]
        assert rank == 1 or 1 < seconds < 14


def test_time_limit_that_is_no_number_is_refused() -> None:
    assert "got 'soon', expected a number of seconds" in run_ranks(1, cases.wrong_limit)[0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("seed", "the block schedule of ranks [1] differs from that of rank 0: seed 1 instead of 0"),
        ("blocks", "the block schedule of ranks [1] differs from that of rank 0: blocks"),
        ("lr", "the param group 0 of ranks [1] differs from that of rank 0: lr 0.002 instead of 0.001"),
        ("model", "the model of ranks [1] differs from that of rank 0: model.embed_tokens.weight (200, 64)"),
        ("class", "the optimizer of ranks [1] differs from that of rank 0: class torch.optim.adamw.AdamW"),
    ],
)
def test_a_rank_that_was_given_something_else_is_named_at_construction(what: str, message: str) -> None:
    texts = run_ranks(2, cases.different, what)
    assert texts[0] == texts[1]
    assert message in texts[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_gradient_that_is_not_finite_is_skipped_or_raises_on_all_ranks(
    precision: str, value: float, tmp_path: Path
) -> None:
    outcomes = run_ranks(2, cases.not_finite, precision, value, str(tmp_path))
    assert outcomes[0] == outcomes[1]
    found = outcomes[0]
    if precision == "fp16":
        assert found["skipped"]
        assert found["errors"] == ["none", "none", "none"]
        return
    assert found["errors"][0] == "none"
    assert all("gradients of step 2 were not finite" in text for text in found["errors"][1:])
    assert found["steps"] == [1]
