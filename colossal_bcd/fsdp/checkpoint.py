"""State of blocks on sharded weights, in this package's files: they load under every engine, and on any mesh."""

from __future__ import annotations

from pathlib import Path

from colossal_bcd.checkpoint.load import check_path
from colossal_bcd.checkpoint.save import index_name, save_folder
from colossal_bcd.checkpoint.trained import EngineState
from colossal_bcd.engine.failures import require_finite, says_where
from colossal_bcd.fsdp.engine import FsdpEngine


@says_where("save of the optimizer")
def save_optimizer(engine: FsdpEngine, folder: str | Path, *, size_per_shard: float = 1024) -> None:
    """Write masters, state, progress, and what waits for its turn; all ranks must call.  The model is saved apart.

    Args:
        engine: what `attach` has returned.
        folder: made if need be; an earlier checkpoint in it is replaced when this one is complete.
        size_per_shard: MiB of tensors in one file.
    Raises:
        CheckpointError: on every rank, with the writer's reason.
        FloatingPointError: the last gradients were not finite, and so are the weights.
    """
    require_finite(engine)
    save_folder(EngineState(engine, engine.parameter_names), Path(folder), None, size_per_shard)


@says_where("load of the optimizer")
def load_optimizer(engine: FsdpEngine, folder: str | Path) -> None:
    """Go on where `save_optimizer`, or a plugin, has saved, on whatever mesh; all ranks must call, with weights loaded.

    Raises:
        CheckpointError: on every rank, it does not fit; nothing is changed then.
    """
    check_path(EngineState(engine, engine.parameter_names), Path(folder), index_name(None)).apply()
