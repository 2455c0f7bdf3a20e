"""One small collective that turns ranks that would diverge into one error on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SAME_CONSTRUCTION = "Construct the same optimizer with the same arguments, seed and parameter names on every rank."

_CHUNK = 2**20
_FACTOR, _SHIFT = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Odd numbers: products of int64 wrap, and no bit of a value is lost in them."""


def require_agreement(
    subject: str,
    fingerprint: list[int],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    remedy: str = SAME_CONSTRUCTION,
) -> None:
    """Compare a fingerprint over all ranks.

    Args:
        subject: what it describes, for the message.
        fingerprint: integers below 2**62 in magnitude, as many on every rank.
        device: where the group's backend communicates.
        group: the ranks; None: all.
        remedy: end of the message.
    Raises:
        ValueError: on every rank, if any two ranks differ.
    """
    if is_equal(fingerprint, device, group):
        return
    everyone: list[list[int] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, fingerprint, group=group)
    reference = everyone[0]
    different = [rank for rank, other in enumerate(everyone) if other != reference]
    raise ValueError(
        f"{subject}: ranks {different} differ from rank 0 (fingerprints {everyone}), expected all ranks to agree. "
        f"{remedy}"
    )


def is_equal(fingerprint: list[int], device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all ranks have the same; for the arguments see `require_agreement`."""
    mine = torch.tensor(fingerprint, dtype=torch.int64, device=device)
    extremes = torch.cat([mine, -mine])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes[: len(mine)], -extremes[len(mine) :]
    return torch.equal(largest, smallest)


def all_agree(fingerprint: list[int], groups: Sequence[dist.ProcessGroup], device: torch.device) -> bool:
    """Whether a fingerprint is the same on all ranks of the product of some groups; every rank gets the same answer.

    Args:
        fingerprint: see `require_agreement`.
        groups: process groups of this rank.
        device: where they communicate.
    """
    mine = torch.tensor(fingerprint, dtype=torch.int64, device=device)
    extremes = torch.cat([mine, -mine])
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return torch.equal(extremes[: len(mine)], -extremes[len(mine) :])


@torch.no_grad()
def fingerprints_of(tensors: Sequence[Tensor], device: torch.device) -> list[int]:
    """One number for the bits of each tensor, in their order; read from the device at once."""
    factors: dict[torch.device, Tensor] = {}
    found = [torch.zeros((), dtype=torch.int64, device=device)]
    for tensor in tensors:
        if tensor.device not in factors:
            places = torch.arange(_CHUNK, device=tensor.device)
            factors[tensor.device] = places.mul_(_FACTOR).add_(_SHIFT).bitwise_or_(1)
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
