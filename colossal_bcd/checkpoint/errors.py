"""Errors in files, which any rank finds and all ranks raise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from colossal_bcd.engine.agreement import gathered, num_ranks
from colossal_bcd.engine.failures import wait_patiently


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the same text on every rank."""


@contextlib.contextmanager
def on_all_ranks() -> Iterator[Callable[[str, str], None]]:
    """Raise on every rank what any rank raises inside, after all of them have come to the end of it.

    Nothing inside may communicate.

    Returns:
        Function of a subject and a text about it, which have to be the same on every rank.
    Raises:
        CheckpointError: the text is the first such rank's; or what was given to the function differs.
    """
    error: Exception | None = None
    said: dict[str, str] = {}
    try:
        yield said.__setitem__
    except Exception as raised:
        error = raised
    raise_on_all_ranks(error, said)


def raise_on_all_ranks(error: Exception | None, said: Mapping[str, str] | None = None) -> None:
    """Raise the first rank's error on all ranks, if there is any, or tell who has said something else than rank 0.

    Errors that say little by themselves get the name of their class.
    """
    text = None
    if error is not None:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if num_ranks() > 1:
        wait_patiently()
    reports = gathered((text, dict(said or {})))
    found = [(rank, text) for rank, (text, _) in enumerate(reports) if text is not None]
    if found:
        rank, text = found[0]
        raise CheckpointError(text if rank == 0 else f"rank {rank}: {text}") from error
    first = reports[0][1]
    for rank, (_, theirs) in enumerate(reports):
        for subject in first:
            if theirs.get(subject) != first[subject]:
                raise CheckpointError(
                    f"{subject}: got {theirs.get(subject)} on rank {rank}, expected {first[subject]} as on rank 0. "
                    "Load from a file system that all ranks share."
                )
