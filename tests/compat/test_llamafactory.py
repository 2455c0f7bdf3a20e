"""What LlamaFactory 0.9.5 takes from badam is in `compat`, with the arguments that it passes.

Read from its sources (train/trainer_utils.py, train/*/trainer.py); the package itself is not installed here.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import models
import pytest
import torch
from test_trainer import PERIOD, losses, trainer_of
from torch import nn
from transformers import Trainer

from colossal_bcd import compat
from colossal_bcd.compat.ratio import _ORDER

NAMES = {
    "BlockOptimizer": (
        "base_optimizer", "named_parameters_list", "block_prefix_list", "switch_block_every", "start_block",
        "switch_mode", "verbose", "ds_zero3_enabled",
    ),
    "BlockOptimizerRatio": (
        "param_groups", "named_parameters_list", "update_ratio", "mask_mode", "verbose", "include_embedding", "lr",
        "betas", "eps",
    ),
    "BAdamCallback": (),
    "clip_grad_norm_old_version": ("self", "parameters", "max_norm", "norm_type"),
}  # fmt: skip
"""Names that are imported from badam, each with the keywords of the calls."""


@pytest.fixture
def badam(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe's one line: who imports badam gets `compat`."""
    monkeypatch.setitem(sys.modules, "badam", compat)
    return importlib.import_module("badam")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_there_and_take_the_arguments(badam: Any, name: str) -> None:
    found = getattr(badam, name)
    if isinstance(found, type):
        inspect.signature(found.__init__).bind(None, **dict.fromkeys(NAMES[name]))  # type: ignore[misc]
    else:
        inspect.signature(found).bind(**dict.fromkeys(NAMES[name]))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_badam_in_its_order(name: str) -> None:
    original = pytest.importorskip("badam")
    theirs = list(inspect.signature(getattr(original, name)).parameters.values())
    ours = list(inspect.signature(getattr(compat, name)).parameters.values())
    if name == "BlockOptimizerRatio":
        assert [each.name for each in ours[:2]] == [each.name for each in theirs[:2]]
        assert list(_ORDER) == [each.name for each in theirs[2:]]
    elif name != "BAdamCallback":  # the original takes anything
        assert [each.name for each in ours[: len(theirs)]] == [each.name for each in theirs]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": [param for param in params if param.dim() < 2], "weight_decay": 0.0},
        {"params": [param for param in params if param.dim() > 1], "weight_decay": 0.01},
    ]


def made(badam: Any, model: Any, mode: str) -> Any:
    adam = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    named = list(model.named_parameters())
    if mode == "ratio":
        return badam.BlockOptimizerRatio(
            param_groups=groups(model), named_parameters_list=named, update_ratio=0.3, mask_mode="adjacent", verbose=0,
            include_embedding=False, **adam,
        )  # fmt: skip
    return badam.BlockOptimizer(
        base_optimizer=torch.optim.AdamW(groups(model), **adam), named_parameters_list=named, block_prefix_list=None,
        switch_block_every=PERIOD, start_block=None, switch_mode="ascending", verbose=0, ds_zero3_enabled=False,
    )  # fmt: skip


def clipping(badam: Any, trainer: Trainer) -> Trainer:
    trainer.accelerator.clip_grad_norm_ = MethodType(badam.clip_grad_norm_old_version, trainer.accelerator)  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("mode", ["layer", "ratio"])
def test_a_trainer_made_its_way_learns(badam: Any, mode: str, tmp_path: Path) -> None:
    model: Any = models.llama()
    optimizer = made(badam, model, mode)
    trainer = clipping(
        badam, trainer_of(model, optimizer, tmp_path, callbacks=(badam.BAdamCallback,), save_strategy="no")
    )
    trainer.train()
    found = losses(trainer)
    assert all(loss > 0 for loss in found)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == len(found)
    assert all(norm > 0 for norm in norms), "the norm before clipping is logged"


def test_shares_are_clipped_by_their_own_norm(badam: Any, tmp_path: Path) -> None:
    """With a bound that is far away the weights are those without clipping, and a small one changes them."""
    results = []
    for bound in (0.0, 1e9, 1e-4):
        model: Any = models.llama()
        optimizer = made(badam, model, "ratio")
        trainer = trainer_of(
            model, optimizer, tmp_path, callbacks=(badam.BAdamCallback,), save_strategy="no", max_grad_norm=bound
        )
        (clipping(badam, trainer) if bound else trainer).train()
        results.append(model.model.layers[0].mlp.up_proj.weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    optimizer = made(badam, models.llama(), "ratio")

    class Accelerator:
        _optimizers = (optimizer,)

    with pytest.raises(ValueError, match=r"norm_type=1 .*dense_gradients=True"):
        badam.clip_grad_norm_old_version(Accelerator(), [], 1.0, 1)
