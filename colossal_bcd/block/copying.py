"""Copies of optimizers that freeze and thaw the parameters of a model: together with the model, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.optim.foreign.twin import attributes

NOT_ALONE = (
    "a BlockOptimizer cannot be pickled or copied by itself: it holds parameters of a model. Save state_dict() "
    "and load it into a new one, or write copy.deepcopy((model, optimizer))."
)


def require_copyable(params: Iterable[Tensor], memo: dict[int, Any], *, alone: bool) -> None:
    """Refuse `copy.deepcopy` of an optimizer without its model (`memo`: copies by id), or with other processes."""
    if not alone:
        raise ValueError(
            "copy.deepcopy of a BlockOptimizer that trains with other processes, expected one of a single process, "
            "as hooks and process groups cannot be copied. Copy model and optimizer before, or make new ones and "
            "load their state."
        )
    if not all(id(param) in memo for param in params):
        raise ValueError(
            "copy.deepcopy of a BlockOptimizer without its model, expected both in one call, as the copy would "
            "train parameters of no model. Write model, optimizer = copy.deepcopy((model, optimizer)), or make a "
            "new one and load the state_dict()."
        )


def copy_base(base: Optimizer, memo: dict[int, Any]) -> None:
    """Copy an optimizer with all that it keeps on the object; torch copies defaults, state and groups."""
    copied = copy.deepcopy(base, memo)
    for name, value in attributes(base).items():
        if name not in vars(copied):
            setattr(copied, name, copy.deepcopy(value, memo))
