"""The loss scale undone and gradients clipped, both in one multiplication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colossal_bcd.sharding import Mesh, Request, Sum, resolve


@torch.no_grad()
def scale_gradients(
    grads: Sequence[Tensor],
    squares: Sequence[Request],
    mesh: Mesh,
    device: torch.device,
    max_norm: float,
    loss_scale: float,
) -> Tensor:
    """Undo the loss scale and clip by the global norm of what is active, in place: one packed sum per axis.

    Args:
        grads: what the step takes: gradients, and images of gradients.
        squares: requests for the squared norm of each; what another pipeline stage counts is not among them.
        mesh: of the optimizer.
        device: where the process groups communicate.
        max_norm: 0 does not clip.
        loss_scale: by which the gradients are too large.
    Returns:
        The norm before clipping, without the loss scale.
    """
    answers = resolve(squares, mesh)
    total = torch.stack(answers).sum() if answers else torch.zeros((), device=device)
    (total,) = resolve([Sum(total, ("pp",))], mesh)
    norm: Tensor = total.sqrt() / loss_scale
    if not grads:
        return norm
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / loss_scale
        torch._foreach_mul_(list(grads), factor)
    elif loss_scale != 1:
        torch._foreach_mul_(list(grads), 1 / loss_scale)
    return norm
