"""Registered optimizers: public names, casts that their own files declare, forms that need no other file."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
import pytorch_optimizer
import torch
from block_net import Net, train, wrap
from support.errors import largest_error
from torch.nn import Parameter
from torch.optim import Optimizer

import colossal_bcd
from colossal_bcd.block import OptimizerCorrection
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.register import register, registered

FOLDERS = ("colossal_bcd.optim", "colossal_bcd.low_rank")


class Lion(Optimizer):
    """What `cast` sees of lion_pytorch 0.2.5's class."""

    def __init__(self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0, decoupled_weight_decay: bool = False):
        self._init_lr, self.decoupled_wd = lr, decoupled_weight_decay
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


Lion.__module__ = "lion_pytorch.lion_pytorch"


def test_registered_names_are_the_package_s() -> None:
    for name, each in registered(*FOLDERS).items():
        assert getattr(colossal_bcd, name) is each.cls
        assert issubclass(each.cls, ShardedOptimizer)
        assert pickle.loads(pickle.dumps(each.cls)) is each.cls
        assert name in colossal_bcd.__all__


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"register\('AdamW'\): got .*Lion, expected a name that is free"):
        register("AdamW")(Lion)
    assert colossal_bcd.AdamW.__name__ == "AdamW"


def test_what_a_file_says_that_it_replaces_is_cast() -> None:
    source = Lion([Parameter(torch.ones(3))], lr=0.5, weight_decay=0.1)
    groups = source.param_groups[0]
    ours = cast(source)
    assert type(ours) is colossal_bcd.Lion
    assert ours.param_groups[0] is groups
    assert (groups["lr"], groups["betas"], groups["weight_decay"]) == (0.5, (0.9, 0.99), 0.1)


def test_options_without_an_equal_leave_an_optimizer_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    source = Lion([Parameter(torch.ones(3))], decoupled_weight_decay=True)
    with caplog.at_level(logging.WARNING):
        assert cast(source) is source
    assert "has decoupled_wd=True, so it is not cast" in caplog.text


def test_lion_is_the_published_one() -> None:
    theirs = [Parameter(torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))]
    ours = [Parameter(theirs[0].detach().clone())]
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    both = [pytorch_optimizer.Lion(theirs, **options), colossal_bcd.Lion(ours, **options)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        grad = torch.randn(7, 5, dtype=torch.float64, generator=generator)
        for param, optimizer in zip((theirs[0], ours[0]), both, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        assert largest_error(ours[0], theirs[0]) <= 1e-12


@pytest.mark.parametrize("name", ["Lion", "GaLoreLion"])
def test_lion_corrects_inactive_blocks(name: str) -> None:
    """Lion's file knows nothing of blocks, of projections or of corrections."""
    model = Net(width=16, dtype=torch.float64)
    options = {"rank": 2} if name == "GaLoreLion" else {}
    correction = OptimizerCorrection(getattr(colossal_bcd, name), **options)
    optimizer = wrap(model, switch_mode="fixed", sgd_mode="all", sgd_lr_scaling=0.5, correction=correction)
    inactive = model.layers[1].weight
    before = inactive.detach().clone()
    train(model, optimizer, 1)
    moved = (inactive.detach() - before).abs()
    assert moved.max() > 0
    if name == "Lion":
        assert largest_error(moved, torch.full_like(moved, 0.5 * 0.01)) <= 1e-12
    else:
        assert torch.linalg.matrix_rank(inactive.detach() - before, tol=1e-9) == 2
