"""Memory-efficient optimizers, exact on every mesh of tensor, ZeRO, data and pipeline parallelism.

sharding/    which part of which tensor a rank has, and the only collectives of an optimizer step
optim/       one algorithm a file; state/: how state is declared, stored and filed; foreign/: other packages' optimizers
low_rank/    GaLore and GoLore: projectors, their refreshes, low-rank gradients; relora/
block/       block coordinate descent: blocks, schedule, `BlockOptimizer`; correction/ of BREAD; ratio/ form of BAdam
engine/      averages gradients, has the masters and writes weights back, on torch alone
checkpoint/  files that do not depend on the mesh
booster/     all of it under ColossalAI's booster
compat/      names and calls of the packages that this one replaces
memory       `estimate`: bytes per rank before anything is allocated
names        what a parameter's name says
testing      ranks as processes, counted collectives, live and peak bytes
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_bcd.block import BlockOptimizer, BlockOptimizerRatio
    from colossal_bcd.low_rank import (
        GaLoreAdafactor,
        GaLoreAdamW,
        GaLoreAdamW8bit,
        GaLoreSGD,
        GoLoreAdafactor,
        GoLoreAdamW,
        GoLoreAdamW8bit,
        GoLoreSGD,
        Projection,
    )
    from colossal_bcd.low_rank.param_groups import param_groups
    from colossal_bcd.memory import estimate
    from colossal_bcd.optim import CAME, SGD, Adafactor, AdamW, Lamb, Storage

_HOMES = {
    "Adafactor": "colossal_bcd.optim",
    "AdamW": "colossal_bcd.optim",
    "CAME": "colossal_bcd.optim",
    "GaLoreAdafactor": "colossal_bcd.low_rank",
    "GaLoreAdamW": "colossal_bcd.low_rank",
    "GaLoreAdamW8bit": "colossal_bcd.low_rank",
    "GaLoreSGD": "colossal_bcd.low_rank",
    "GoLoreAdafactor": "colossal_bcd.low_rank",
    "GoLoreAdamW": "colossal_bcd.low_rank",
    "GoLoreAdamW8bit": "colossal_bcd.low_rank",
    "GoLoreSGD": "colossal_bcd.low_rank",
    "Lamb": "colossal_bcd.optim",
    "Projection": "colossal_bcd.low_rank",
    "SGD": "colossal_bcd.optim",
    "Storage": "colossal_bcd.optim",
    "BlockOptimizer": "colossal_bcd.block",
    "param_groups": "colossal_bcd.low_rank.param_groups",
    "BlockOptimizerRatio": "colossal_bcd.block",
    "estimate": "colossal_bcd.memory",
}

__all__ = [
    "Adafactor",
    "AdamW",
    "CAME",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreSGD",
    "GoLoreAdafactor",
    "GoLoreAdamW",
    "GoLoreAdamW8bit",
    "GoLoreSGD",
    "Lamb",
    "Projection",
    "SGD",
    "Storage",
    "BlockOptimizer",
    "param_groups",
    "BlockOptimizerRatio",
    "estimate",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
