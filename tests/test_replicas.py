"""Blocks on several processes without an engine: plain loops, torch's DDP, accelerate; equal to one process."""

from __future__ import annotations

from typing import Any

import pytest
import replica_cases as cases
import torch

from colossal_bcd.testing import run_ranks

KINDS = ("plain", "ddp", "ddp first", "ddp unused")
MODES = ("ascending", "descending", "random", "fixed", "importance")

TABLE: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    **{f"{mode}-{kind}": ((kind, {"switch_mode": mode}), {}) for mode in MODES for kind in KINDS},
    **{f"always-{kind}": ((kind, {"active_modules": ["lm_head."]}), {"evaluate": kind != "plain"}) for kind in KINDS},
    **{f"clip-{kind}": ((kind, {}), {"clip": 0.05, "accumulate": 3}) for kind in KINDS},
    "every pass averaged": (("ddp", {}), {"clip": 0.05, "accumulate": 2, "no_sync": False}),
}


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], bound: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("world", [2, 3])
def test_replicas_equal_one_process(world: int) -> None:
    results = run_ranks(world, cases.many, TABLE)
    for name, (args, options) in TABLE.items():
        want = cases.whole(world, args[1], **{k: v for k, v in options.items() if k in ("accumulate", "clip")})
        for result in results:
            compare(result[name]["weights"], want, 1e-12)
