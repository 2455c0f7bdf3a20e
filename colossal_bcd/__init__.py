"""Memory-efficient optimizers, exact on every mesh of tensor, ZeRO, data and pipeline parallelism.

sharding/    which part of which tensor a rank has, and the only collectives of an optimizer step
optim/       one algorithm a file; state/: how state is declared, stored and filed; foreign/: other packages' optimizers
low_rank/    GaLore and GoLore: projectors, their refreshes, low-rank gradients; relora/
block/       block coordinate descent: blocks, schedule, `BlockOptimizer`; correction/ of BREAD; ratio/ form of BAdam
engine/      averages gradients, has the masters and writes weights back, on torch alone
checkpoint/  files that do not depend on the mesh
booster/     all of it under ColossalAI's booster
fsdp/        all of it over torch's own sharded weights
compat/      names and calls of the packages that this one replaces
cli/         the command `colossal-bcd`
memory/      `estimate`: bytes per rank before anything is allocated; activations, and what a step sends
names        what a parameter's name says
testing      ranks as processes, counted collectives, live and peak bytes
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_bcd.block import BlockOptimizer as BlockOptimizer
    from colossal_bcd.block import BlockOptimizerRatio as BlockOptimizerRatio
    from colossal_bcd.low_rank import GaLoreAdafactor as GaLoreAdafactor
    from colossal_bcd.low_rank import GaLoreAdamW as GaLoreAdamW
    from colossal_bcd.low_rank import GaLoreAdamW8bit as GaLoreAdamW8bit
    from colossal_bcd.low_rank import GaLoreSGD as GaLoreSGD
    from colossal_bcd.low_rank import GoLoreAdafactor as GoLoreAdafactor
    from colossal_bcd.low_rank import GoLoreAdamW as GoLoreAdamW
    from colossal_bcd.low_rank import GoLoreAdamW8bit as GoLoreAdamW8bit
    from colossal_bcd.low_rank import GoLoreSGD as GoLoreSGD
    from colossal_bcd.low_rank import Projection as Projection
    from colossal_bcd.low_rank.param_groups import param_groups as param_groups
    from colossal_bcd.memory import estimate as estimate
    from colossal_bcd.optim import CAME as CAME
    from colossal_bcd.optim import SGD as SGD
    from colossal_bcd.optim import Adafactor as Adafactor
    from colossal_bcd.optim import AdamW as AdamW
    from colossal_bcd.optim import Lamb as Lamb
    from colossal_bcd.optim import Lion as Lion
    from colossal_bcd.optim import Storage as Storage

__version__ = "0.1.0"

_HOMES = {
    "BlockOptimizer": "colossal_bcd.block",
    "BlockOptimizerRatio": "colossal_bcd.block",
    "Projection": "colossal_bcd.low_rank",
    "Storage": "colossal_bcd.optim",
    "estimate": "colossal_bcd.memory",
    "param_groups": "colossal_bcd.low_rank.param_groups",
}


def _optimizers() -> dict[str, Any]:
    """Every registered optimizer by its public name (see `optim.register`)."""
    register = importlib.import_module("colossal_bcd.optim.register")
    return {name: each.cls for name, each in register.registered("colossal_bcd.optim", "colossal_bcd.low_rank").items()}


def __getattr__(name: str) -> Any:
    # Nothing is imported with the package: each name is looked up when it is first asked for, and then stays.
    if name == "__all__":
        return sorted([*_HOMES, *_optimizers()])
    if name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
    elif not name.startswith("_") and name in (optimizers := _optimizers()):
        found = optimizers[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
