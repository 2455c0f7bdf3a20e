"""Ranks that would diverge get one error, the same on all of them.

gathered            what every rank gives, by rank
is_equal            whether a few integers are the same on all ranks, by one small all-reduce
require_agreement   the same, with an error that names the ranks that differ
fingerprints_of     integers for the bits of tensors;  digest: one for any value
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

SAME_CONSTRUCTION = "Construct the same optimizer with the same arguments, seed and parameter names on every rank."

_CHUNK = 2**20
_FACTOR, _SHIFT = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Odd numbers: products of int64 wrap, and no bit of a value is lost in them."""

T = TypeVar("T")
Group = dist.ProcessGroup | None
"""Ranks; None: all."""


def num_ranks(group: Group = None) -> int:
    """How many processes there are; 1 where torch.distributed is not used."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gathered(mine: T, group: Group = None) -> list[T]:
    """What every rank gives, by rank; all ranks must call."""
    everyone = [mine] * num_ranks(group)
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine, group=group)
    return everyone


def is_equal(fingerprint: Sequence[int], device: torch.device, groups: Sequence[Group] = (None,)) -> bool:
    """Whether all ranks have the same; every rank gets the same answer.

    Args:
        fingerprint: integers below 2**62 in magnitude, as many on every rank.
        device: where the groups communicate.
        groups: process groups of this rank, whose product are the ranks.
    """
    mine = torch.tensor(fingerprint, dtype=torch.int64, device=device)
    extremes = torch.cat([mine, -mine])
    for group in groups:
        if num_ranks(group) > 1:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return torch.equal(extremes[: len(mine)], -extremes[len(mine) :])


def require_agreement(
    subject: str,
    fingerprint: list[int],
    device: torch.device,
    group: Group = None,
    remedy: str = SAME_CONSTRUCTION,
) -> None:
    """Compare a fingerprint over all ranks.

    Args:
        subject: what it describes, for the message.
        fingerprint: see `is_equal`.
        device: where the group's backend communicates.
        group: the ranks.
        remedy: end of the message.
    Raises:
        ValueError: on every rank, if any two ranks differ.
    """
    if is_equal(fingerprint, device, (group,)):
        return
    everyone = gathered(fingerprint, group)
    raise ValueError(
        f"{subject}: ranks {differing(everyone)} differ from rank 0 (fingerprints {everyone}), expected all ranks to "
        f"agree. {remedy}"
    )


def differing(everyone: Sequence[Any]) -> list[int]:
    """Ranks that gave something else than rank 0."""
    return [rank for rank, other in enumerate(everyone) if other != everyone[0]]


def digest(value: Any) -> int:
    """An integer below 2**62 for a value whose `repr` says all of it."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 2


@torch.no_grad()
def fingerprints_of(tensors: Sequence[Tensor], device: torch.device) -> list[int]:
    """One number for the bits of each tensor, in their order; read from the device at once."""
    factors: dict[torch.device, Tensor] = {}
    found = [torch.zeros((), dtype=torch.int64, device=device)]
    for tensor in tensors:
        if tensor.device not in factors:
            numbers = torch.arange(_CHUNK, device=tensor.device)
            factors[tensor.device] = numbers.mul_(_FACTOR).add_(_SHIFT).bitwise_or_(1)
        found.append(_fingerprint(tensor, factors[tensor.device]).to(device))
    return torch.stack(found)[1:].bitwise_and_(2**61 - 1).tolist()


def _fingerprint(tensor: Tensor, factors: Tensor) -> Tensor:
    size = min(tensor.element_size(), 8)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    values = tensor.detach().reshape(-1).view(integer)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in values.split(_CHUNK):
        total = total.mul_(_FACTOR).add_((chunk.to(torch.int64) * factors[: len(chunk)]).sum())
    return total
