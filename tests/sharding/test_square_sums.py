"""Norms depend on values, not on where they lie."""

from __future__ import annotations

import torch

from colossal_bcd.sharding.lazy import square_sum


def test_replicas_at_other_addresses_have_the_same_norm() -> None:
    """Replicated float64 weights whose storages begin elsewhere on two ranks would drift apart otherwise."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        values, found = torch.randn(1000, dtype=torch.float64, generator=draw), set()
        for start in range(8):
            place = torch.empty(1008, dtype=torch.float64)[start : start + 1000].copy_(values)
            found.add(square_sum(place).item())
        assert len(found) == 1
