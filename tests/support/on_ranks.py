"""What many tests do on ranks: give gradients, compare replicas, and read errors and messages."""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """By name and step, the same on all ranks: multiples of 3/32 of every size that bfloat16 averages exactly."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{step}".encode()))
    return torch.randint(-40, 41, shape, generator=generator) * (3 / 32)


def equal_on_ranks(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> bool:
    """Whether tensors are bitwise equal on the ranks of a group, and no NaN; all of them must call."""
    equal = True
    for tensor in tensors:
        mine = tensor.detach().double()
        largest = mine.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        equal &= torch.equal(largest, mine)
    return equal


def message_of(call: Callable[[], Any], errors: tuple[type[Exception], ...] = (ValueError, TypeError)) -> str:
    """What an error of these kinds that a call raises says; "no error" where it raises none."""
    try:
        call()
    except errors as error:
        return str(error)
    return "no error"


@contextlib.contextmanager
def heard(level: int = logging.INFO) -> Iterator[list[str]]:
    """Messages of the package, of this level and above, while the context lasts."""
    messages: list[str] = []
    handler, logger = logging.Handler(level), logging.getLogger("colossal_bcd")
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level, logger.getEffectiveLevel()))
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
