"""What trains changes while training goes on: the numbers are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import thaw_cases as cases
import thaw_guard_cases as guards
from support.errors import largest_error

from colossal_bcd.testing import run_ranks


@pytest.mark.parametrize("plugin", cases.PLUGINS)
def test_thaw_numbers_are_those_of_one_process(plugin: str) -> None:
    """A layer thawed after boosting never trained; one that was added trained on each rank's own gradients."""
    want = {case: cases.one_process(row[0], row[1], 2, row[2]) for case, row in cases.cases(plugin)}
    for got in run_ranks(2, cases.table, plugin):
        for case, weights in want.items():
            assert largest_error(got[case], weights) <= 1e-12, case


@pytest.mark.parametrize("event", ["thaw", "group"])
@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (2, {"tp_size": 2, "pp_size": 1, "zero_stage": 0}),
        (2, {"tp_size": 1, "pp_size": 2, "zero_stage": 1, "num_microbatches": 2}),
        (4, {"tp_size": 2, "pp_size": 1, "zero_stage": 2}),
    ],
    ids=["tp2", "pp2", "tp2-zero2"],
)
def test_thaw_on_meshes(num_ranks: int, options: dict[str, Any], event: str) -> None:
    """SGD: other orders of sums leave gradients of at most 1 a few units of 2^-24 apart, of which each of at most six
    steps keeps lr / (1 - momentum), a half.
    """
    data_ranks = num_ranks // 2
    whole = cases.llama(event, data_ranks)
    seen = set()
    for errors in run_ranks(num_ranks, cases.llama, event, data_ranks, options, whole):
        seen |= errors.keys()
        assert largest_error(errors, dict.fromkeys(errors, 0.0)) <= 6 * 0.5 * 8 * 2**-24
    assert seen == whole.keys()


@pytest.mark.parametrize("plugin", ["zero1", "zero2", "hybrid0", "ddp"])
def test_blocks_that_a_batch_misses_train_on_the_others(plugin: str) -> None:
    """A rank whose batch used nothing of the active block raised, and the others died of it."""
    want = cases.blocks_miss("one process")
    for got in run_ranks(2, cases.blocks_miss, plugin):
        assert largest_error(got, want) <= 1e-12


@pytest.mark.parametrize("plugin", ["zero1", "zero2", "hybrid0"])
def test_thaw_on_some_ranks_is_an_error_on_all(plugin: str) -> None:
    for messages in run_ranks(2, guards.differing, plugin):
        assert messages.pop("the same") == "no error"
        for case, message in messages.items():
            assert "data-parallel ranks differ" in message, case


@pytest.mark.parametrize("plugin", ["zero1", "zero2", "hybrid0"])
def test_thaw_sends_nothing_more_in_other_steps(plugin: str) -> None:
    """The step that takes a layer over agrees on it and reduces its gradients apart; all others have their buckets."""
    for counts in run_ranks(2, guards.collectives, plugin):
        late, start = counts["late"], counts["from the start"]
        assert [late[step] for step in (0, 1, 3, 4)] == [start[0]] * 4
        assert sum(late[2].values()) == sum(start[2].values()) + 2


def test_thaw_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    for errors in run_ranks(2, guards.resumed, "zero2", str(tmp_path)):
        assert largest_error(errors, [0.0] * len(errors)) == 0.0


def test_thaw_refuses_what_is_no_newcomer() -> None:
    for found in run_ranks(2, guards.refusals):
        assert "is in a param group already" in found["in a group"]
        assert "trains in its group as soon as it requires grad" in found["frozen in a group"]
        assert "not in the boosted model" in found["not in the model"]
        assert "not in the boosted model" in found["not in the model, inner"]
        for where in ("wrapper", "inner", "base"):
            assert "after the blocks were made" in found[f"blocks, {where}"]


def test_blocks_refuse_parameters_of_the_base_optimizer_alone() -> None:
    """The next switch failed on lists of unequal lengths."""
    model = cases.Net()
    blocks = cases.vision_blocks(model)
    blocks.base_optimizer.add_param_group({"params": list(model.head.parameters())})
    with pytest.raises(ValueError, match="after the blocks were made"):
        blocks.step()


def test_thaw_under_engines_that_cannot_follow_is_an_error() -> None:
    """They trained what was thawed or added on each rank's own gradients, or not at all."""
    for found in run_ranks(2, guards.other_engines):
        for case, message in found.items():
            frozen = case.endswith("frozen")
            assert ("no error" if frozen else "thawed or added after boosting, such as head.weight") in message, case
