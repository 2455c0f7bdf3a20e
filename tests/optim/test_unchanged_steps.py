"""What is checked and declared once, and that a change between two steps is seen by the next one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.errors import largest_error
from torch import nn

from colossal_bcd import CAME, SGD, Adafactor, AdamW, Lamb, Lion
from colossal_bcd.optim import base

MAKE: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params: AdamW(params, lr=1e-2),
    "SGD": lambda params: SGD(params, lr=1e-2, momentum=0.9),
    "Lamb": lambda params: Lamb(params, lr=1e-2),
    "Lion": lambda params: Lion(params, lr=1e-2),
    "Adafactor": lambda params: Adafactor(params, lr=1e-2, relative_step=False),
    "CAME": lambda params: CAME(params, lr=1e-2),
}


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (4, 3))]


def step(optimizer: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


@pytest.mark.parametrize("name", MAKE)
def test_unchanged_steps_check_and_declare_nothing_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = MAKE[name](weights())
    step(optimizer)
    seen: list[str] = []
    monkeypatch.setattr(base, "require_fits", lambda *_: seen.append("shape"))
    monkeypatch.setattr(base, "require_real", lambda *_: seen.append("dtype"))
    monkeypatch.setattr(optimizer, "state_spec", lambda *_: seen.append("state"))
    step(optimizer)
    assert seen == []


@pytest.mark.parametrize("name", MAKE)
def test_parameters_that_change_between_steps_are_checked_again(name: str) -> None:
    params = weights()
    optimizer = MAKE[name](params)
    step(optimizer)
    before = params[0].data
    params[0].data = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(3, 4\), but its layout says \(4, 3\)"):
        step(optimizer)
    params[0].data = torch.ones(4, 3, dtype=torch.complex64)
    params[0].grad = torch.ones(4, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex"):
        optimizer.step()
    params[0].grad = None
    params[0].data = before
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("name", MAKE)
def test_hyper_parameters_that_change_between_steps_have_an_effect(name: str) -> None:
    params = weights()
    optimizer = MAKE[name](params)
    step(optimizer)
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, 1)
    assert largest_error(before, [param.detach() for param in params]) == 0
    optimizer.param_groups[0]["lr"] = 1e-2
    step(optimizer, 2)
    assert all(not torch.equal(old, param.detach()) for old, param in zip(before, params, strict=True))


@pytest.mark.parametrize("name", MAKE)
def test_parameters_that_leave_the_groups_are_let_go(name: str) -> None:
    optimizer = MAKE[name](weights())
    step(optimizer)
    gone = optimizer.param_groups[0]["params"].pop(0)
    reference = weakref.ref(gone)
    optimizer.state.pop(gone)
    optimizer._layouts.pop(gone)
    optimizer._keys.pop(gone)
    del gone
    step(optimizer)
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("name", MAKE)
def test_a_step_that_some_parameters_miss_counts_for_the_others_only(name: str) -> None:
    """Members of one stack have one step number; after this they have two."""
    params, twins = weights(), weights()
    optimizer = MAKE[name](params)
    alone = [MAKE[name]([twin]) for twin in twins]
    for number in range(5):
        for index, (param, twin) in enumerate(zip(params, twins, strict=True)):
            is_there = index != 0 or number not in (1, 3)
            param.grad = torch.full_like(param, 0.5 + number) if is_there else None
            twin.grad = None if param.grad is None else param.grad.clone()
        optimizer.step()
        for each in alone:
            each.step()
    assert largest_error([param.detach() for param in params], [twin.detach() for twin in twins]) <= 1e-6
    assert [optimizer.state[param]["step"] for param in params] == [3, 5, 5]


@pytest.mark.parametrize("decoupled", [False, True])
def test_state_that_a_hyper_parameter_asks_for_later_is_refused(decoupled: bool) -> None:
    """It ended in a KeyError, by torch's kernel and by the rule."""
    optimizer = SGD(weights(), lr=1e-2, weight_decay=0.1, decoupled_weight_decay=decoupled)
    step(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"expected momentum_buffer, too.*set after the first step.*state.clear\(\)"):
        step(optimizer)
    optimizer.state.clear()
    step(optimizer)
