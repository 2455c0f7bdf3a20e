"""ColossalAI's writing of models: errors on one rank would leave the others waiting, and one kind of weight fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from colossalai.checkpoint_io import general_checkpoint_io, hybrid_parallel_checkpoint_io, utils
from colossalai.checkpoint_io.index_file import CheckpointIndexFile
from colossalai.tensor.padded_tensor import api as padding
from safetensors import SafetensorError

from colossal_bcd.checkpoint.errors import raise_together

ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full or broken disk raises, in Python, in torch and in safetensors."""


@contextlib.contextmanager
def writing_together() -> Iterator[None]:
    """Inside, ranks that cannot write go on with ColossalAI's collectives; at the end, all raise what the first met.

    Raises:
        CheckpointError: on every rank.
    """
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
    raise_together(errors[0] if errors else None)


def _holding(function: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    def held(*args: Any, **kwargs: Any) -> Any:
        if errors:
            return None
        try:
            return function(*args, **kwargs)
        except ERRORS as error:
            errors.append(error)
            return None

    return held
