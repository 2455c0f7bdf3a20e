"""The part that knows ColossalAI: plugins, casts, masters and gradients of what is trained."""

from colossal_bcd.booster.checkpoint import CheckpointError, CheckpointFolder, Resumed
from colossal_bcd.booster.config import LowRankOptions
from colossal_bcd.booster.explain import estimate, explain
from colossal_bcd.booster.install import install
from colossal_bcd.booster.low_level import LowLevelZeroOptimizer
from colossal_bcd.booster.plugins import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossal_bcd.booster.registry import cast

__all__ = [
    "CheckpointError",
    "CheckpointFolder",
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
