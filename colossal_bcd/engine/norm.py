"""Norms of whole gradients, which clip them, and of whole blocks, from the shares that ranks have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.importance import Importance, squared_norms
from colossal_bcd.engine.masters import ShardedMasters
from colossal_bcd.sharding import Layout, Mesh


def total_of(squares: Sequence[Tensor], device: torch.device) -> Tensor:
    """[1] the sum of squared norms, each a scalar, in this pipeline stage."""
    return (torch.stack(list(squares)).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)).view(
        1
    )


@torch.no_grad()
def totals_of(
    squares: Mapping[Parameter, Tensor], device: torch.device, importance: Importance | None = None
) -> Tensor:
    """[1 + a] the squared norm of all gradients and, where importance asks for them, those of the a active blocks.

    Args:
        squares: squared norms over all ranks, but for other pipeline stages, by parameter.
        device: where the process groups communicate.
        importance: see there.
    """
    total = total_of(list(squares.values()), device)
    if importance is None or not importance.by_gradient:
        return total
    return torch.cat([total, importance.by_block(squares, total)])


@torch.no_grad()
def scale_gradients(
    grads: Sequence[Tensor],
    totals: Tensor,
    max_norm: float,
    loss_scale: float = 1.0,
    importance: Importance | None = None,
) -> Tensor:
    """Undo the loss scale and clip by the global norm of what is active, in place.

    Args:
        grads: what the step takes: whole and low-rank gradients.
        totals: see `totals_of`, over all ranks.
        max_norm: 0 does not clip.
        loss_scale: by which the gradients are too large.
        importance: notes the norms of blocks.
    Returns:
        The norm before clipping, without the loss scale.
    """
    if importance is not None and importance.by_gradient:
        importance.note(totals[1:] / loss_scale**2)
    norm: Tensor = totals[0].sqrt() / loss_scale
    if not grads:
        return norm
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / loss_scale
        torch._foreach_mul_(list(grads), factor)
    elif loss_scale != 1:
        torch._foreach_mul_(list(grads), 1 / loss_scale)
    return norm


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
