"""Optimizers of other packages that are known to be right on any part of a tensor; nothing is imported for it."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

from torch.optim import Optimizer

_BITS = ("", "8bit", "32bit")

ELEMENTWISE: dict[str, set[str]] = {
    "torch.optim": {
        "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    },
    "transformers.optimization": {"AdamW"},
    "colossalai.nn.optimizer": {"CPUAdam", "FusedAdam", "FusedSGD", "HybridAdam"},
    "bitsandbytes.optim": {
        *map("".join, product(("Adagrad", "RMSprop", "SGD"), _BITS)),
        *map("".join, product(("", "Paged"), ("Adam", "AdamW", "AdEMAMix", "Lion"), _BITS)),
    },
}  # fmt: skip
"""Package -> optimizers whose update of a value needs that value alone: right on any shard as they are."""

UPDATE_METHODS = ("step", "update_step", "_get_lr", "_get_options", "_rms", "_approx_sq_grad")
"""What makes the update: bitsandbytes' optimizers share `step` and differ in the second; the others are Adafactor's."""


def is_known_elementwise(optimizer: Optimizer) -> bool:
    """Whether the optimizer runs the update of one of `ELEMENTWISE`."""
    cls = type(optimizer)
    listed = (parent for parent in cls.__mro__ for package in ELEMENTWISE if _lists(package, parent))
    nearest = next(listed, None)
    return nearest is not None and runs_update_of(nearest, cls)


def runs_update_of(parent: type, cls: type) -> bool:
    """Whether a class updates as an ancestor of it does."""
    pairs: list[Any] = [[getattr(each, method, None) for each in (parent, cls)] for method in UPDATE_METHODS]
    return all(inspect.unwrap(theirs) is inspect.unwrap(ours) for theirs, ours in pairs)


def is_of(cls: type, package: str) -> bool:
    """Whether a class is defined in a package or in a module of it."""
    return cls.__module__ == package or cls.__module__.startswith(package + ".")


def _lists(package: str, cls: type) -> bool:
    return cls.__qualname__ in ELEMENTWISE[package] and is_of(cls, package)
