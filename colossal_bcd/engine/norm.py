"""Clips gradients by their global norm in the step, together with the loss scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.importance import Importance
from colossal_bcd.sharding import Mesh, Request, Sum, resolve


@torch.no_grad()
def scale_gradients(
    grads: Sequence[Tensor],
    squares: Mapping[Parameter, Request],
    mesh: Mesh,
    device: torch.device,
    max_norm: float,
    loss_scale: float,
    importance: Importance | None = None,
) -> Tensor:
    """Undo the loss scale and clip by the global norm of what is active, in place: one packed sum per axis.

    Args:
        grads: what the step takes: gradients, and images of gradients.
        squares: requests for their squared norms by parameter; what another pipeline stage counts is not among them.
        mesh: of the optimizer.
        device: where the process groups communicate.
        max_norm: 0 does not clip.
        loss_scale: by which the gradients are too large.
        importance: notes the norms of blocks, which travel with the total.
    Returns:
        The norm before clipping, without the loss scale.
    """
    answers = dict(zip(squares, resolve(list(squares.values()), mesh), strict=True))
    totals = (
        torch.stack(list(answers.values())).sum() if answers else torch.zeros((), dtype=torch.float64, device=device)
    )
    totals = totals.view(1)
    if importance is not None and importance.by_gradient:
        totals = torch.cat([totals, importance.by_block(answers, totals)])
    (totals,) = resolve([Sum(totals, ("pp",))], mesh)
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
