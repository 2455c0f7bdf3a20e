"""GoLore's ReLoRA form under data parallelism: the same numbers as one process."""

from __future__ import annotations

import pytest
import relora_cases
import torch

from colossal_bcd.testing import run_ranks

CASES = [
    ("zero1", 2, "adamw"),
    ("zero1-overlap", 2, "torch-adamw"),
    ("zero2", 2, "sgd"),
    ("zero2", 3, "adamw"),
    ("ddp", 2, "torch-adamw"),
    ("torch", 2, "sgd"),
]
RANDOM_FROM = 2 * relora_cases.GAP


@pytest.mark.parametrize(("plugin", "num_ranks", "kind"), CASES)
def test_relora_ranks_equal_one_process(plugin: str, num_ranks: int, kind: str) -> None:
    """Two refreshes with singular vectors and two random ones; a layer is used by one rank alone, and only later."""
    reports = run_ranks(num_ranks, relora_cases.distributed, plugin, kind, RANDOM_FROM)
    for report in reports:
        assert report["same_names"]
        assert report["equal"]
        assert report["error"] <= 1e-12
    if plugin.startswith("zero"):
        whole = run_ranks(1, relora_cases.distributed, "zero2", kind, RANDOM_FROM)[0]["held"]
        assert max(report["held"] for report in reports) <= whole / num_ranks + 40  # each of 18 entries is padded


def test_relora_refresh_makes_the_same_collectives_at_any_depth() -> None:
    """Flags of gradients, gradients, bases, and the sharded moments."""
    for depth in (1, 4):
        for calls in run_ranks(2, relora_cases.collectives, depth):
            assert calls == {"all_reduce": 4}


def test_relora_refresh_without_full_gradient_raises_on_all_ranks() -> None:
    messages = run_ranks(2, relora_cases.without_full_gradient)
    assert len(set(messages)) == 1
    assert "forward_type = True" in messages[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_relora_ranks_stay_equal_in_low_precision(precision: str) -> None:
    """fp16 begins with a loss scale that overflows, also in a step that refreshes."""
    for report in run_ranks(2, relora_cases.low_precision, precision):
        assert report["equal"]
        assert report["dtype"] == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        assert report["last"] < 0.9 * report["first"]


def test_relora_under_tensor_parallelism_is_refused_by_name() -> None:
    for message in run_ranks(2, relora_cases.tensor_parallel):
        assert "GoLoreAdamW" in message
