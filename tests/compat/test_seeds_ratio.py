"""The parameter-ratio form of documents 001 and 002 (READMEs of BAdam), with only the import changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from on_ranks import equal_on_ranks
from seed_code import RATIO, SPARSE, renamed

from colossal_bcd import BlockOptimizerRatio, compat
from colossal_bcd.testing import run_ranks

CASES = {"sparse": (SPARSE, "SparseGradOptimizer"), "ratio": (RATIO, "BlockOptimizerRatio")}


def made(code: str, model: Any) -> BlockOptimizerRatio:
    groups = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0).param_groups
    names: dict[str, Any] = {"param_groups": groups, "self": SimpleNamespace(model=model)}
    exec(renamed(code), names)
    return names["optimizer"]


def shares(model: Any, before: dict[str, torch.Tensor]) -> dict[str, float]:
    """Part of every tensor that has changed."""
    return {name: float((param.detach() != before[name]).float().mean()) for name, param in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_ratio_code_trains_a_tenth_of_every_tensor(case: str) -> None:
    code, name = CASES[case]
    model: Any = models.llama()
    optimizer = made(code, model)
    assert type(optimizer) is getattr(compat, name)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    tokens, losses = models.tokens(0), []
    for step in range(110):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 99:
            # A norm of 64 values is below the threshold and trains whole; embedding and head are not included.
            for name, share in shares(model, before).items():
                want = 0.0 if "embed" in name or "lm_head" in name else 1.0 if "norm" in name else 0.1
                assert share == pytest.approx(want, abs=0.01), name
    assert max(shares(model, before).values()) == 1.0
    assert shares(model, before)["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.2, abs=0.01)
    assert losses[-1] < losses[0] - 0.1


def boosted(case: str) -> dict[str, Any]:
    from colossalai.booster import Booster

    from colossal_bcd.booster import LowLevelZeroPlugin

    model: Any = models.llama().bfloat16()
    optimizer = made(CASES[case][0], model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    model, engine, *_ = booster.boost(model, optimizer)
    for step in range(3):
        tokens = models.tokens(2 * step + dist.get_rank())
        booster.backward(model(input_ids=tokens, labels=tokens).loss, engine)
        engine.step()
        engine.zero_grad()
    return {"equal": equal_on_ranks(model.parameters()), "shares": shares(model.unwrap(), before)}


@pytest.mark.parametrize("case", CASES)
def test_ratio_code_runs_under_zero(case: str) -> None:
    pytest.importorskip("colossalai")
    for report in run_ranks(2, boosted, case):
        assert report["equal"]
        assert 0.05 < report["shares"]["model.layers.0.mlp.up_proj.weight"] < 0.11
        assert report["shares"]["lm_head.weight"] == 0
