"""Lines that users see because they asked for them by `verbose`, with or without logging set up."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from colossal_bcd.sharding import Mesh

logger = logging.getLogger(__name__)


def announce(message: str) -> None:
    """Log a line at level INFO, on the first process.

    Python's root logger takes warnings only, unless somebody decides otherwise.  That is no decision about these lines,
    so they go to all handlers there are, or, as warnings would, to stderr where there are none.  A level that was set
    for "colossal_bcd" (or above WARNING for the root), `logging.disable` and filters hold as ever.
    """
    if not (is_first() and _is_wanted()):
        return
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, (), None, "announce")
    if logger.hasHandlers():
        logger.handle(record)
    elif logger.filter(record):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("colossal_bcd: %(message)s"))
        handler.handle(record)


def blocks_line(num_blocks: int, untrained: int, frozen: int, correction: str | None) -> str:
    """What becomes of parameters in no block, of which some were frozen before."""
    fate = "stay frozen" if correction is None else f"are only corrected ({correction})"
    before = f"; {frozen} were frozen before and are in none" if frozen else ""
    return f"{num_blocks} blocks; {untrained} trainable parameters are in none and {fate}{before}"


def active_line(num_steps: int, active: Sequence[int], names: Sequence[str], stages: Sequence[Sequence[int]]) -> str:
    """Which blocks train; `stages` are those of a pipeline that hold each block, or empty."""
    blocks = [f"{index} ({names[index]})" for index in active]
    if not stages:
        verb = "blocks {} of {} are" if len(active) > 1 else "block {} of {} is"
        return f"step {num_steps}: {verb.format(', '.join(blocks), len(names))} active"
    parts = []
    for index, block in zip(active, blocks, strict=True):
        noun, verb = ("stages", "train") if len(stages[index]) > 1 else ("stage", "trains")
        parts.append(f"{noun} {', '.join(map(str, stages[index]))} {verb} block {block}")
    return f"step {num_steps}: {'; '.join(parts)} of {len(names)}"


def is_first() -> bool:
    """Of the processes of a launcher, which counts them in the environment before they know of each other."""
    return Mesh().is_first and os.environ.get("RANK", "0") == "0"


def _is_wanted() -> bool:
    if logger.disabled or logger.manager.disable >= logging.INFO:
        return False
    current: logging.Logger | None = logger
    while current is not None and current is not logging.root:
        if current.level != logging.NOTSET:
            return current.level <= logging.INFO
        current = current.parent
    return logging.root.level <= logging.WARNING
