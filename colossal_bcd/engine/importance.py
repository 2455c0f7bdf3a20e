"""Norms of whole blocks from the parts that ranks hold."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.importance import squared_norms
from colossal_bcd.engine.masters import ShardedMasters
from colossal_bcd.sharding import Layout, Mesh


@torch.no_grad()
def squared_weights(
    blocks: Sequence[Sequence[Parameter]],
    masters: ShardedMasters,
    mesh: Mesh,
    device: torch.device,
    tied_elsewhere: Set[Parameter],
) -> Tensor:
    """[number of blocks] float64 squared norms of the weights in the model, in one all-reduce over all ranks.

    Args:
        blocks: working parameters of each block that are on this rank.
        masters: say which part of each this rank counts.
        mesh: of the optimizer.
        device: where the process groups communicate.
        tied_elsewhere: parameters that another pipeline stage counts.
    """
    parts = [
        [masters.weight_of(param).reshape(-1)[: masters.layout(param).num_local] for param in params]
        for params in (
            [param for param in block if param not in tied_elsewhere and _counts(masters.layout(param), mesh)]
            for block in blocks
        )
    ]
    squares = squared_norms(parts, device)
    dist.all_reduce(squares)
    return squares


def _counts(layout: Layout, mesh: Mesh) -> bool:
    """Whether this rank's part of a parameter counts: replicas of it do not."""
    divided = {"data": "zero" in layout.axes, "tp": "tp" in layout.axes}
    return all(divided[axis] or mesh.rank(axis) == 0 for axis in divided)
