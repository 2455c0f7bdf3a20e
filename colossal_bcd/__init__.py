"""Memory-efficient optimizers for tensor-parallel, ZeRO, data- and pipeline-parallel training with ColossalAI."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Adafactor": "colossal_bcd.optim",
    "AdamW": "colossal_bcd.optim",
    "CAME": "colossal_bcd.optim",
    "GaLoreAdafactor": "colossal_bcd.optim",
    "GaLoreAdamW": "colossal_bcd.optim",
    "GaLoreAdamW8bit": "colossal_bcd.optim",
    "GaLoreSGD": "colossal_bcd.optim",
    "GoLoreAdafactor": "colossal_bcd.optim",
    "GoLoreAdamW": "colossal_bcd.optim",
    "GoLoreAdamW8bit": "colossal_bcd.optim",
    "GoLoreSGD": "colossal_bcd.optim",
    "Lamb": "colossal_bcd.optim",
    "BlockOptimizer": "colossal_bcd.block",
    "param_groups": "colossal_bcd.groups",
    "BlockOptimizerRatio": "colossal_bcd.block",
    "estimate": "colossal_bcd.memory",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
