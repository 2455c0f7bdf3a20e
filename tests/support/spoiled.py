"""Optimizers whose results are no numbers, for the tests that tables notice it."""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from colossal_bcd.engine.failures import LateCheck


def spoil(optimizer: Optimizer, *_: Any) -> None:
    """Fill the last parameter and its state with NaN: folds that lose NaN lose it where it does not come first."""
    params = [param for group in optimizer.param_groups for param in group["params"] if param.numel()]
    if not params or not params[-1].is_floating_point():
        return
    state = optimizer.state.get(params[-1], {}).values()
    for tensor in (params[-1], *state):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.data.fill_(torch.nan)


@contextlib.contextmanager
def spoiled_steps() -> Iterator[None]:
    """Spoil after every step of any optimizer, references that are optimizers among them: NaN equals no NaN.

    The engines' own check of gradients, which would end most runs before a table is there, is off.
    """
    handle = register_optimizer_step_post_hook(spoil)
    check = LateCheck.raise_if_bad
    LateCheck.raise_if_bad = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        handle.remove()
        LateCheck.raise_if_bad = check  # type: ignore[method-assign]


@contextlib.contextmanager
def few(kept: Mapping[str, Any]) -> Iterator[None]:
    """Tables with few rows: by the dotted name of a dictionary or list the keys or elements that stay, or another."""
    before = []
    for path, names in kept.items():
        module, name = importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]
        table = getattr(module, name)
        before.append((module, name, table))
        chosen = isinstance(table, dict) and not isinstance(names, dict)
        setattr(module, name, {key: table[key] for key in names} if chosen else names)
    try:
        yield
    finally:
        for module, name, table in before:
            setattr(module, name, table)


def call_each(
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]], kept: Mapping[str, Any]
) -> list[tuple[Any, str]]:
    """What ranks run: of every function its result under spoiled steps and with small tables, or its traceback.

    Functions that compare, too, may end in an assertion; the result is then None.
    """
    found = []
    with few(kept), spoiled_steps():
        for function, arguments in calls:
            try:
                found.append((function(*arguments), ""))
            except AssertionError:
                found.append((None, ""))
            except Exception:
                found.append((None, traceback.format_exc()))
    return found
