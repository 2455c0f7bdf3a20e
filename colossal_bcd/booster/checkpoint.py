"""ColossalAI's checkpoint io, made safe for what the engine holds."""

from __future__ import annotations

import functools
from typing import Any

from colossalai.checkpoint_io import CheckpointIO

from colossal_bcd.block import BlockOptimizer
from colossal_bcd.optim import ShardedOptimizer


def checkpoint_io(stock: CheckpointIO) -> CheckpointIO:
    """A plugin's checkpoint io with two differences.

    Masters follow a model that is loaded, under every plugin.  Saving and loading a block optimizer raises, on every
    rank, because ColossalAI's format has no place for the block, its masters and the schedule.
    """
    cls: Any = type(stock)
    stock.__class__ = _safe(cls)
    return stock


@functools.cache
def _safe(cls: Any) -> Any:
    class SafeCheckpointIO(cls):
        def load_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().load_model(model, *args, **kwargs)
            if hasattr(model, "update_master_params"):
                model.update_master_params()
            return result

        def save_optimizer(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            require_plain(getattr(optimizer, "optim", None))
            return super().save_optimizer(optimizer, *args, **kwargs)

        def load_optimizer(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            require_plain(getattr(optimizer, "optim", None))
            return super().load_optimizer(optimizer, *args, **kwargs)

    return SafeCheckpointIO


def require_plain(optimizer: Any) -> None:
    """Refuse an optimizer whose state ColossalAI's format cannot hold.

    Raises:
        ValueError: it is a block optimizer, or has state that is not one value per value of the parameter.
    """
    if isinstance(optimizer, ShardedOptimizer) and not optimizer.is_elementwise:
        raise ValueError(
            f"saving or loading an optimizer under a plugin: got {type(optimizer).__name__}, whose state has other "
            "shapes than the parameters, which ColossalAI's format cannot hold. Save the model; a run starts with "
            "fresh state."
        )
    if isinstance(optimizer, BlockOptimizer):
        raise ValueError(
            "saving or loading an optimizer under a plugin: got a BlockOptimizer, whose block, masters and schedule "
            "ColossalAI's format cannot hold, expected another one. Save the model; a run starts at its first block."
        )
