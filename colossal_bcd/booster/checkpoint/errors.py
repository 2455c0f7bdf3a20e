"""Errors in files, found by any rank, raised by all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the same text on every rank."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise on every rank what any rank raises inside, after all of them have come to the end of it.

    Nothing inside may communicate.

    Raises:
        CheckpointError: the text is the first such rank's.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """Raise the first rank's error on all ranks, if there is any."""
    texts: list[str | None] = [None if error is None else describe(error)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, None if error is None else describe(error))
    found = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if found:
        rank, text = found[0]
        raise CheckpointError(text if rank == 0 else f"rank {rank}: {text}") from error


def describe(error: Exception) -> str:
    """Text of an error; errors that say little by themselves get the name of their class."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
