"""The parameter-ratio form under the plugins: the same entries and numbers as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import ratio_cases
from support.errors import largest_error

from colossal_bcd.testing import run_ranks

CASES: dict[str, tuple[int, str, dict[str, Any], str]] = {
    "zero1-2": (2, "zero", {"stage": 1}, "adjacent"),
    "zero2-3": (3, "zero", {"stage": 2}, "scatter"),
    "tp2": (2, "hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 0}, "scatter"),
    "tp2-zero2": (4, "hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 2}, "adjacent"),
    "tp2-zero2-scatter": (4, "hybrid", {"tp_size": 2, "pp_size": 1, "zero_stage": 2}, "scatter"),
}


@pytest.mark.parametrize("case", CASES)
def test_ratio_plugin_step_equals_one_process(case: str) -> None:
    """Over two switches.  Each step rounds a master (below 4) once, and its update (below 0.02) some ten times."""
    num_ranks, kind, options, mode = CASES[case]
    reports = run_ranks(num_ranks, ratio_cases.injected, kind, options, mode)
    for report in reports:
        assert report["error"] <= ratio_cases.STEPS * 2**-24 * (4 + 16 * 0.02)
        assert report["equal"]
        assert report["frozen"] == ["model.embed_tokens.weight"]
    # Moments of the share alone, each on one rank: norms, of fewer values than the threshold, train whole on each.
    sizes = {name: param.numel() for name, param in models.llama().named_parameters() if "embed" not in name}
    share = sum(int(size * 0.3) if size >= 100 else size for size in sizes.values())
    norms = sum(size for size in sizes.values() if size < 100)
    held = [sum(each) for each in zip(*(report["bytes"] for report in reports), strict=True)]
    assert max(held) <= 8 * (share + norms * (num_ranks - 1))
    assert held[0] >= 8 * share
    assert held[2] == held[5] == 0  # a period is over
    if mode == "scatter":
        # Equally by chance: a rank's 30,000 entries or less deviate by 200.
        assert max(max(report["bytes"]) for report in reports) <= 8 * (share / num_ranks + norms + 6 * 200)


@pytest.mark.parametrize(
    ("num_ranks", "kind", "options", "dense", "accumulation"),
    [
        (2, "zero", {"stage": 2, "precision": "fp32"}, False, 1),
        (2, "zero", {"stage": 1, "precision": "fp32"}, False, 2),
        (2, "ddp", {"find_unused_parameters": True}, True, 1),
        (2, "ddp", {}, False, 2),
    ],
)
def test_ratio_plugin_run_equals_one_process(
    num_ranks: int, kind: str, options: dict[str, Any], dense: bool, accumulation: int
) -> None:
    """Adam amplifies what float32 sums in another order differ by; 1e-4 is the bound of other optimizers' runs here."""
    want = run_ranks(1, ratio_cases.alone)[0]
    for losses in run_ranks(num_ranks, ratio_cases.trained, kind, options, dense, accumulation):
        assert largest_error(losses, want) <= 1e-4


def test_ratio_goes_on_from_files_where_no_engine_shards_it(tmp_path: Path) -> None:
    """It trained the first share after a load, in the place of the one that the files say."""
    assert run_ranks(2, ratio_cases.resumed, str(tmp_path)) == [True, True]


def test_ratio_leaves_gradients_to_the_engine() -> None:
    assert not any(run_ranks(1, ratio_cases.hooks_after_boosting)[0])


@pytest.mark.parametrize("stage", [1, 2])
def test_ratio_gradients_of_the_share_alone_travel_and_stay(stage: int) -> None:
    sizes = {name: param.numel() for name, param in models.llama().named_parameters() if "embed" not in name}
    share = sum(int(size * 0.3) if size >= 100 else size for size in sizes.values())
    for report in run_ranks(2, ratio_cases.traffic, stage):
        name = {1: "all_reduce", 2: "reduce_scatter_tensor"}[stage]
        # A flag per parameter, and slices of unequal shares are padded to the larger one.
        assert 4 * share <= report[name] <= 1.05 * 4 * share
        assert report["calls"] == 1
        # At stage 2 this rank's part; the loss's graph is freed with it, so that less may be held than before.
        assert report["held"] <= 1.05 * 4 * share / stage + 4096


def test_ratio_explains_itself() -> None:
    text = run_ranks(1, ratio_cases.explained)[0]
    line = next(line for line in text.splitlines() if "layers.0.mlp.up_proj" in line)
    assert "BlockOptimizerRatio" in line
    # Two moments of the share; at one rank the weight is its own master.
    assert f" {8 * int(64 * 96 * 0.3)} " in line
