"""Casts of galore_torch's and ColossalAI's GaLore: hyper-parameters carried, the same numbers as the originals'."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import bitsandbytes.optim.optimizer as bitsandbytes_optimizer
import colossalai.nn.optimizer as theirs
import galore_torch
import pytest
import torch
from registry_cases import trained, weights
from support.signs import signed_svd

from colossal_bcd import BlockOptimizer, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.booster.explanation import explain

GROUP = {"rank": 3, "update_proj_gap": 2, "scale": 0.5, "proj_type": "reverse_std"}
RELATIVE = {"relative_step": False, "lr": 0.01}


def groups(params: list[Any], **options: Any) -> list[dict[str, Any]]:
    """A projected matrix; the original fails on tensors of other dims in such a group."""
    return [
        {"params": params[:1], "lr": 0.02, "weight_decay": 0.1, **GROUP, **options},
        {"params": params[1:], "lr": 0.03, "note": "mine"},
    ]


@pytest.mark.parametrize("rank", [3, 100])
@pytest.mark.parametrize(
    ("source", "ours", "options"),
    [
        (galore_torch.GaLoreAdamW, GaLoreAdamW, {"betas": (0.8, 0.95), "eps": 1e-5}),
        (galore_torch.GaLoreAdamW, GaLoreAdamW, {"correct_bias": False, "weight_decay": 0.05}),
        (galore_torch.GaLoreAdafactor, GaLoreAdafactor, {**RELATIVE, "beta1": 0.9}),
        (galore_torch.GaLoreAdafactor, GaLoreAdafactor, {**RELATIVE, "scale_parameter": False, "clip_threshold": 0.5}),
    ],
)
def test_cast_galore_trains_as_the_original(source: Any, ours: Any, options: dict[str, Any], rank: int) -> None:
    """Both decompose the same float32 gradients.  A rank above a side is that side there, too."""
    before, after = weights(), weights()
    optimizer = cast(source(groups(after, rank=rank), **options))
    assert type(optimizer) is ours
    with signed_svd():
        original = trained(source(groups(before, rank=rank), **options), before)
    for one, other in zip(original, trained(optimizer, after), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_cast_galore_keeps_groups_and_schedulers() -> None:
    source = galore_torch.GaLoreAdamW(groups(weights()), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(source, lambda step: 0.5**step)
    kept = list(source.param_groups)
    optimizer = cast(source)
    assert all(mine is theirs for mine, theirs in zip(optimizer.param_groups, kept, strict=True))
    trained(optimizer, [param for group in optimizer.param_groups for param in group["params"]])
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.015]
    first, second = optimizer.param_groups
    assert {key: first[key] for key in GROUP} == GROUP
    assert (first["weight_decay"], second["rank"], second["note"]) == (0.1, None, "mine")


def eight_bit(params: Any, **options: Any) -> Any:
    return galore_torch.GaLoreAdamW8bit(groups(params), **options)


def test_cast_8bit_galore_of_galore_torch() -> None:
    optimizer: Any = cast(eight_bit(weights(), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2, min_8bit_size=17))
    assert type(optimizer) is GaLoreAdamW8bit
    first, second = optimizer.param_groups
    assert (first["min_8bit_size"], first["state_bits"], first["betas"], first["eps"]) == (17, 8, (0.8, 0.95), 1e-6)
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.2)
    text = explain(optimizer)
    assert "GaLoreAdamW8bit" in text
    assert "8x6" in text


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"percentile_clipping": 5}, "percentile_clipping=5.*max_norm"),
        ({"block_wise": False}, "block_wise=False.*blocks"),
        ({"is_paged": True}, "is_paged=True.*cpu_offload"),
    ],
)
def test_cast_8bit_galore_refuses_what_has_no_equal(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        cast(eight_bit(weights(), **options))


@pytest.fixture
def older_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """ColossalAI passes two options by name which bitsandbytes 0.50 no longer has, so that nothing can be made."""
    init = bitsandbytes_optimizer.Optimizer2State.__init__

    def with_options(self: Any, *given: Any, percentile_clipping: int, block_wise: bool, **options: Any) -> None:
        init(self, *given, **options)
        if not isinstance(self.args, SimpleNamespace):
            self.args.percentile_clipping, self.args.block_wise = percentile_clipping, block_wise

    monkeypatch.setattr(bitsandbytes_optimizer.Optimizer2State, "__init__", with_options)


@pytest.mark.usefixtures("older_bitsandbytes")
@pytest.mark.parametrize("name", ["GaLoreAdamW8bit", "DistGaloreAwamW"])
def test_cast_colossalais_galore(name: str, caplog: pytest.LogCaptureFixture) -> None:
    source = getattr(theirs, name)(groups(weights()), nbits=32, min_8bit_size=5, eps=1e-7)
    with caplog.at_level(logging.WARNING, "colossal_bcd"):
        optimizer: Any = cast(source)
    assert type(optimizer) is GaLoreAdamW8bit
    group = optimizer.param_groups[0]
    assert (group["state_bits"], group["min_8bit_size"], group["eps"], group["clamp"]) == (32, 5, 1e-7, True)
    assert {key: group[key] for key in GROUP} == GROUP
    assert len(caplog.messages) == 1
    assert "cast to the GaLore of the paper" in caplog.text
    # What ColossalAI takes where a group does not say it.
    (group, *_) = cast(getattr(theirs, name)([{"params": weights()[:1], "rank": 2}])).param_groups
    assert (group["update_proj_gap"], group["scale"], group["proj_type"]) == (200, 0.25, "std")
    args = SimpleNamespace(optim_bits=8, min_8bit_size=9, percentile_clipping=3, block_wise=True)
    with pytest.raises(ValueError, match=f"{name}: got percentile_clipping=3"):
        cast(getattr(theirs, name)(groups(weights()), args=args))


def test_cast_leaves_a_galore_with_a_step_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(galore_torch.GaLoreAdamW):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            """Something else."""

    optimizer = Mine(weights())
    assert cast(optimizer) is optimizer
    assert "overrides the step of galore_torch.AdamW" in caplog.text


def test_cast_galore_inside_a_block_optimizer() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(6, 4) for _ in range(2))})
    base = galore_torch.GaLoreAdamW([{"params": [p for p in model.parameters() if p.dim() == 2], **GROUP},
                                     {"params": [p for p in model.parameters() if p.dim() < 2]}])  # fmt: skip
    wrapped = BlockOptimizer(base, list(model.named_parameters()), switch_block_every=2, verbose=0)
    optimizer: Any = cast(wrapped)
    assert optimizer is wrapped
    assert type(optimizer.base_optimizer) is GaLoreAdamW
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(4):
        loss = sum(layer(torch.ones(3, 6)).square().sum() for layer in model["layers"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
