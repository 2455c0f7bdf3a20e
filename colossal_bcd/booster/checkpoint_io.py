"""A plugin's checkpoint io, complete for what this package trains.

ColossalAI's writing of models has two faults that are mended here: an error on one rank would leave the others waiting,
and one kind of weight fails.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from colossalai.checkpoint_io import CheckpointIO, general_checkpoint_io, hybrid_parallel_checkpoint_io, utils
from colossalai.checkpoint_io.index_file import CheckpointIndexFile
from colossalai.tensor.padded_tensor import api as padding
from safetensors import SafetensorError

from colossal_bcd.checkpoint.errors import CheckpointError, on_all_ranks, raise_on_all_ranks
from colossal_bcd.checkpoint.files import replacing
from colossal_bcd.checkpoint.load import check_path
from colossal_bcd.checkpoint.opened import read_torch
from colossal_bcd.checkpoint.save import index_name, save_file, save_folder
from colossal_bcd.checkpoint.trained import boosted_of
from colossal_bcd.engine.failures import require_finite, says_where

logger = logging.getLogger(__name__)

ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full or broken disk raises, in Python, in torch and in safetensors."""


def checkpoint_io(stock: CheckpointIO) -> CheckpointIO:
    """A plugin's checkpoint io that saves and loads all state of the optimizers of this package, on any mesh.

    Masters follow a model that is loaded, under every plugin.  Optimizers that another library shards are left to
    ColossalAI's own format.
    """
    cls: Any = type(stock)
    if not getattr(cls, "is_complete", False):
        stock.__class__ = _complete(cls)
    return stock


@functools.cache
def _complete(cls: Any) -> Any:
    class CompleteCheckpointIO(cls):
        is_complete = True

        @says_where("load of the model")
        def load_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().load_model(model, *args, **kwargs)
            if hasattr(model, "update_master_params"):
                model.update_master_params()
            return result

        @says_where("save of the model")
        def save_model(self, model: Any, *args: Any, **kwargs: Any) -> None:
            with writing_together():
                super().save_model(model, *args, **kwargs)

        @says_where("save of the optimizer")
        def save_optimizer(
            self,
            optimizer: Any,
            checkpoint: str,
            shard: bool = False,
            gather_dtensor: bool = True,
            prefix: str | None = None,
            size_per_shard: int = 1024,
            use_async: bool = False,
        ) -> None:
            boosted = boosted_of(optimizer)
            require_finite(optimizer)
            if boosted is None:
                super().save_optimizer(
                    optimizer, checkpoint, shard, gather_dtensor, prefix, size_per_shard, use_async=use_async
                )
                return
            if not gather_dtensor:
                raise CheckpointError(
                    "save_optimizer(gather_dtensor=False): files here never depend on the mesh. Leave it at True."
                )
            if use_async:
                logger.warning("save_optimizer(use_async=True): this package's state is written at once")
            if shard:
                save_folder(boosted, Path(checkpoint), prefix, size_per_shard)
            else:
                save_file(boosted, Path(checkpoint))

        @says_where("load of the optimizer")
        def load_optimizer(
            self, optimizer: Any, checkpoint: str, prefix: str | None = None, *args: Any, **kwargs: Any
        ) -> None:
            boosted = boosted_of(optimizer)
            if boosted is None:
                super().load_optimizer(optimizer, checkpoint, prefix, *args, **kwargs)
                return
            check_path(boosted, Path(checkpoint), index_name(prefix)).apply()

        @says_where("save of the scheduler")
        def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> None:
            with on_all_ranks():
                if dist.get_rank() == 0:
                    with replacing(Path(checkpoint)) as file:
                        torch.save(lr_scheduler.state_dict(), file)
                    # A file that cannot be read safely is found now, not when it is needed.
                    read_torch(Path(checkpoint), contents=False)

        @says_where("load of the scheduler")
        def load_lr_scheduler(self, lr_scheduler: Any, checkpoint: str) -> None:
            with on_all_ranks():
                state = read_torch(Path(checkpoint), contents=dist.get_rank() == 0)
            lr_scheduler.load_state_dict(state)

    return CompleteCheckpointIO


@contextlib.contextmanager
def writing_together() -> Iterator[None]:
    """Inside, ranks that cannot write go on with ColossalAI's collectives; at the end, all raise what the first met."""
    errors: list[Exception] = []
    owners: list[Any] = [utils, general_checkpoint_io, hybrid_parallel_checkpoint_io]
    places = [(owner, "save_state_dict") for owner in owners] + [(CheckpointIndexFile, "write_index_file")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, function in before:
        setattr(owner, name, _holding(function, errors))
    unpad = padding._hijack_back_detach_and_clone
    before.append((padding, "_hijack_back_detach_and_clone", unpad))
    # Of a padded vocabulary that no tensor parallelism divides, ColossalAI unpads a detached copy, which lacks what it
    # would restore, and raises AttributeError.
    padding._hijack_back_detach_and_clone = lambda tensor: unpad(tensor) if hasattr(tensor, "_unpad_detach") else tensor
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
    raise_on_all_ranks(errors[0] if errors else None)


def _holding(function: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if errors:
            return None
        try:
            return function(*args, **kwargs)
        except ERRORS as error:
            errors.append(error)
            return None

    return guarded
