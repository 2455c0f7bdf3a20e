"""State that others wrote: plain PyTorch, the original block optimizer, ColossalAI; and its own plugins."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoint_foreign_cases as cases
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from colossal_bcd.testing import run_ranks


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run_ranks(1, cases.write_plain, str(folder))
    return folder


def state_of(folder: Path) -> dict[str, Tensor]:
    """Moments in a checkpoint of ours."""
    names = json.loads((folder / "optimizer_index.json").read_text())["files"]
    tensors = {key: value for name in names for key, value in load_file(folder / name).items()}
    return {key: value for key, value in tensors.items() if not key.endswith((".master", ".step"))}


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key].to(found[key].dtype)) for key in want)


@pytest.mark.parametrize(("optimizer", "mesh", "ranks"), [("adamw", "zero2 x3", 3), ("torch", "tp2", 2)])
def test_state_of_a_plain_adamw_loads(optimizer: str, mesh: str, ranks: int, plain: Path, tmp_path: Path) -> None:
    outcomes = run_ranks(ranks, cases.loaded, optimizer, mesh, str(plain / "adamw"), str(tmp_path))
    state_dict = torch.load(plain / "adamw", weights_only=True)
    assert len(state_dict["state"]) == len(list(cases.plain().parameters()))
    assert_same(state_of(tmp_path), cases.of_state(state_dict, cases.plain()))
    index = json.loads((tmp_path / "optimizer_index.json").read_text())
    if optimizer == "adamw":
        assert index["numbers"]["lm_head.weight"] == {"step": cases.STEPS}
    assert all(outcome["loss"] > 0 for outcome in outcomes)


def test_state_with_an_option_that_is_not_ours_is_refused(plain: Path) -> None:
    texts = run_ranks(2, cases.load_amsgrad, str(plain / "amsgrad"))
    assert texts[0] == texts[1]
    assert "amsgrad=True, which AdamW of colossal_bcd cannot honour" in texts[0]


def test_state_of_the_original_block_optimizer_loads_into_the_active_block(plain: Path, tmp_path: Path) -> None:
    """It has no block and no position: they are those of the optimizer that loads, the steps those of the state."""
    outcomes = run_ranks(2, cases.load_badam, str(plain / "badam"), str(tmp_path))
    state_dict = torch.load(plain / "badam", weights_only=True)
    want = cases.of_state(state_dict, cases.plain().model.layers[1])
    assert len(want) == 2 * 9
    assert_same(state_of(tmp_path), {f"model.layers.1.{key}": value for key, value in want.items()})
    for outcome in outcomes:
        assert outcome["taken"] == cases.STEPS
        assert outcome["active"] == "model.layers.1"
        assert outcome["next"] == "model.layers.2"


@pytest.mark.parametrize(
    ("plugin", "mesh", "ranks", "vocab"),
    # ColossalAI itself cannot save the state of a vocabulary that it has padded.
    [("zero", "zero2 x3", 3, 250), ("hybrid", "tp2", 2, 256)],
)
def test_lamb_of_colossalai_loads(plugin: str, mesh: str, ranks: int, vocab: int, tmp_path: Path) -> None:
    run_ranks(2, cases.write_colossalai, plugin, str(tmp_path), vocab)
    state_dict = torch.load(tmp_path / "whole.bin", weights_only=True)
    want = cases.of_state(state_dict, cases.plain())
    assert len(want) == 2 * len(list(cases.plain().parameters()))
    for kind in ("whole.bin", "sharded"):
        run_ranks(ranks, cases.loaded, "lamb", mesh, str(tmp_path / kind), str(tmp_path / f"{kind} again"), vocab)
        assert_same(state_of(tmp_path / f"{kind} again"), want)


def test_stock_plugins_save_and_load_everything_after_install(tmp_path: Path) -> None:
    straight = run_ranks(2, cases.stock_saves, "zero", str(tmp_path / "zero"))
    resumed = run_ranks(2, cases.stock_resumes, "zero", str(tmp_path / "zero"), str(tmp_path / "again"))
    assert resumed == straight
    crossed = run_ranks(2, cases.stock_resumes, "hybrid", str(tmp_path / "zero"), str(tmp_path / "hybrid"))
    # Both compute in bfloat16 and add activations in another order.
    assert crossed[0] == pytest.approx(straight[0], abs=0.02)
    first = state_of(tmp_path / "zero" / "optimizer")
    for name in ("again", "hybrid"):
        assert_same(state_of(tmp_path / name / "optimizer"), first)
    ours = run_ranks(3, cases.loaded, "came", "zero2 x3", str(tmp_path / "zero" / "optimizer"), str(tmp_path / "ours"))
    assert_same(state_of(tmp_path / "ours"), first)
    assert ours[0]["loss"] > 0
