"""Files that are damaged, foreign or cannot be written: an error on all ranks, and nothing changed."""

from __future__ import annotations

from pathlib import Path

import checkpoint_error_cases as cases
import pytest

from colossal_bcd.booster import CheckpointFolder
from colossal_bcd.testing import run_ranks


def test_damaged_checkpoints_are_named_on_all_ranks_and_change_nothing(tmp_path: Path) -> None:
    ranks = run_ranks(2, cases.damaged, str(tmp_path))
    assert ranks[0] == ranks[1]
    expected = {
        "missing": "safetensors is missing",
        "truncated": "truncated",
        "corrupted": "is corrupted: its SHA-256",
        "no index": "has no optimizer_index.json",
        "broken index": "got no JSON",
        "foreign index": "got format None",
        "newer version": "version 99",
    }
    for how, (text, untouched) in ranks[0].items():
        assert expected[how] in text
        assert str(tmp_path / how) in text
        assert untouched, how


def test_damaged_files_are_named_on_all_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(2, cases.damaged_file, str(tmp_path))
    assert ranks[0] == ranks[1]
    expected = {
        "absent": "is missing",
        "truncated": "cannot be read",
        "corrupted": "corrupt",
        "a model": "got ['weight'], expected an optimizer's state",
        "an object": "holds more than tensors",
        "text": "cannot be read",
    }
    for name, text in ranks[0].items():
        assert expected[name] in text, (name, text)
        assert name in text


def test_checkpoints_of_something_else_are_refused_on_all_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(2, cases.of_another_run, str(tmp_path))
    assert ranks[0] == ranks[1]
    texts = {name: text for name, (text, _) in ranks[0].items()}
    assert "a checkpoint of AdamW, expected one of CAME" in texts["adamw into came"]
    assert "a checkpoint of Lamb, expected one of AdamW" in texts["lamb into adamw"]
    assert "of a plain optimizer, expected one of a BlockOptimizer" in texts["adamw into badam"]
    assert "of a BlockOptimizer, expected one of a plain optimizer" in texts["badam into adamw"]
    assert "float32 master" in texts["bf16 into fp32"]
    assert all(untouched for _, untouched in ranks[0].values())


def test_full_disk_is_an_error_on_all_ranks_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    ranks = run_ranks(2, cases.full_disk, str(tmp_path))
    assert ranks[0]["texts"] == ranks[1]["texts"]
    assert all("File too large" in text for text in ranks[0]["texts"]), ranks[0]["texts"]
    assert ranks[0]["left"] == ["alone", "step-00000001"]
    assert ranks[0]["step"] == 1
    assert ranks[0]["unchanged"]


def test_checkpoint_folder_keeps_the_last_and_finds_the_newest(tmp_path: Path) -> None:
    for found in run_ranks(2, cases.loops, str(tmp_path)):
        assert found["nothing"] is None
        assert found["steps"] == [2, 3]
        # A folder without a manifest is nobody's checkpoint, and is left alone.
        assert found["names"] == ["step-00000002", "step-00000003", "step-00000099"]
        assert found["resumed"] == (3, {"losses": [0.5, 0.5, 0.5]})
        assert found["earlier"] == 2
        assert "step-00000001 is missing, expected one of the steps [2, 3]" in found["missing"]


def test_checkpoint_folder_checks_the_model_before_anything_is_loaded(tmp_path: Path) -> None:
    outcomes = run_ranks(2, cases.damaged_model, str(tmp_path))
    assert outcomes[0] == outcomes[1]
    assert "model" in outcomes[0][0]
    assert "corrupted" in outcomes[0][0]
    assert outcomes[0][1]


def test_checkpoint_folder_refuses_to_keep_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last: got 0"):
        CheckpointFolder(tmp_path, keep_last=0)


def test_saving_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """All state is several times as much as what the writing rank holds beside its own."""
    (peak, largest, total), (other_peak, *_) = run_ranks(2, cases.peak_of_saving, str(tmp_path))
    # A whole tensor, its half that was received, and the names of all tensors as they are exchanged.
    assert peak <= 1.5 * largest + 2**16
    assert other_peak <= 0.5 * largest + 2**16
    assert total > 4 * peak


def test_random_state_of_every_rank_goes_on(tmp_path: Path) -> None:
    assert run_ranks(2, cases.random_state, str(tmp_path)) == [[True], [True]]


def test_loss_scale_goes_on_with_its_counters(tmp_path: Path) -> None:
    for before, after in run_ranks(2, cases.loss_scale, str(tmp_path)):
        assert before == after
        assert before[1] > 0


def test_state_dict_of_the_boosted_optimizer_is_whole() -> None:
    assert run_ranks(2, cases.state_dicts) == [[True, True, True]] * 2


def test_parts_of_a_block_optimizer_contribute_state_of_their_own(tmp_path: Path) -> None:
    assert run_ranks(2, cases.contributed, "tp2", str(tmp_path), True) == [(5, True)] * 2
    assert run_ranks(2, cases.contributed, "zero2 x2", str(tmp_path), False) == [(5, True)] * 2


@pytest.mark.parametrize("optimizer", ["badam", "came"])
def test_checkpoints_under_data_parallelism(optimizer: str, tmp_path: Path) -> None:
    for straight, resumed in run_ranks(2, cases.ddp, optimizer, str(tmp_path)):
        assert len(straight) == 2
        assert resumed == straight
