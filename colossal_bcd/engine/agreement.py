"""One small collective that turns ranks that would diverge into one error on all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist


def require_agreement(subject: str, fingerprint: list[int], device: torch.device) -> None:
    """Compare a fingerprint over all ranks.

    Args:
        subject: what it describes, for the message.
        fingerprint: integers below 2**62 in magnitude, as many on every rank.
        device: where the group's backend communicates.
    Raises:
        ValueError: on every rank, if any two ranks differ.
    """
    mine = torch.tensor(fingerprint, dtype=torch.int64, device=device)
    extremes = torch.cat([mine, -mine])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[: len(mine)], -extremes[len(mine) :]
    if torch.equal(largest, smallest):
        return
    everyone: list[list[int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fingerprint)
    reference = everyone[0]
    different = [rank for rank, other in enumerate(everyone) if other != reference]
    raise ValueError(
        f"{subject}: ranks {different} differ from rank 0 (fingerprints {everyone}), expected all ranks to agree. "
        "Construct the same optimizer with the same arguments, seed and parameter names on every rank."
    )
