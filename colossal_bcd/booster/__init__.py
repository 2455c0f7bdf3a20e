"""The part that knows ColossalAI, and the only one that imports it, when one of these names is asked for.

What a user calls
    plugins        LowLevelZeroPlugin, HybridParallelPlugin and TorchDDPPlugin
    fsdp           FSDP2Plugin: weights are sharded, too
    low_level      `LowLevelZeroOptimizer`, for programs without a booster
    stock_plugins  `install`: this package's optimizers under ColossalAI's own plugins
    distributed    ColossalAI's distributed optimizers, and the call that tells them what is divided
    explanation    `explain`: a table of what the boosted optimizer does with every parameter
From the user's optimizer to ours
    casts/         what each optimizer becomes
    boosting       what `boost` checks and does before ColossalAI sees model and optimizer
    arguments      arguments of ColossalAI's plugins that are refused or without effect
    adapters       weights of LoRA and ReLoRA
    layouts        which region of which weight each rank has: the one reader of ColossalAI's marks
The engine under ColossalAI
    zero           `ZeroOptimizer`: backward, average, step and gather of what trains now
    gradients      what loss scale, sequence parallelism and clipping do to averages
    stock_surface  what user code reads from ColossalAI's wrappers
    dropout        one mask on all ranks where they have the same activations
    pipeline       stages that train nothing, or something else than the others
    checkpoint_io  `booster.save_optimizer` and `save_model`
    cpu_accelerator   ColossalAI on CPUs with gloo
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_bcd.booster.casts.registry import cast
    from colossal_bcd.booster.explanation import estimate, explain
    from colossal_bcd.booster.fsdp import FSDP2Plugin
    from colossal_bcd.booster.low_level import LowLevelZeroOptimizer
    from colossal_bcd.booster.plugins import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
    from colossal_bcd.booster.stock_plugins import install
    from colossal_bcd.checkpoint import CheckpointError, CheckpointFolder, Resumed
    from colossal_bcd.engine.config import LowRankOptions

_HOMES = {
    "CheckpointError": "colossal_bcd.checkpoint",
    "CheckpointFolder": "colossal_bcd.checkpoint",
    "FSDP2Plugin": "colossal_bcd.booster.fsdp",
    "HybridParallelPlugin": "colossal_bcd.booster.plugins",
    "LowLevelZeroOptimizer": "colossal_bcd.booster.low_level",
    "LowLevelZeroPlugin": "colossal_bcd.booster.plugins",
    "LowRankOptions": "colossal_bcd.engine.config",
    "Resumed": "colossal_bcd.checkpoint",
    "TorchDDPPlugin": "colossal_bcd.booster.plugins",
    "cast": "colossal_bcd.booster.casts.registry",
    "estimate": "colossal_bcd.booster.explanation",
    "explain": "colossal_bcd.booster.explanation",
    "install": "colossal_bcd.booster.stock_plugins",
}
__all__ = [
    "CheckpointError",
    "CheckpointFolder",
    "FSDP2Plugin",
    "HybridParallelPlugin",
    "LowLevelZeroOptimizer",
    "LowLevelZeroPlugin",
    "LowRankOptions",
    "Resumed",
    "TorchDDPPlugin",
    "cast",
    "estimate",
    "explain",
    "install",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
