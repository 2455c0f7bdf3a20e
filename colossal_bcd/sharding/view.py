"""What a rule sees of one parameter, or of several of equal layout.

n: values of data on this rank; b: number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.rounds import Sum


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are computed and reduced: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


ROW = 4096
"""Values that are added up one after the other; a float32 sum loses digits in proportion to them."""


def square_sum(x: Tensor) -> Tensor:
    """Squared Euclidean norm over the last dim, which stays with length 1.

    In float32 or wider; it keeps its digits at any length.
    """
    x = x.to(wide(x.dtype))
    num_rows = x.shape[-1] // ROW
    rest = x[..., num_rows * ROW :]
    total = rest.square().sum(-1, keepdim=True)
    if num_rows:
        rows = x[..., : num_rows * ROW].view(*x.shape[:-1], num_rows, ROW)
        total += torch.linalg.vector_norm(rows, dim=-1).square_().sum(-1, keepdim=True)
    return total


class ShardView:
    """The data of one parameter on this rank, flat, and requests for quantities of the whole parameter.

    A stack of b parameters of equal layout has the same view with a leading dim: [b, n] instead of [n].

    Args:
        layout: of each parameter.
        param: a tensor of `layout.local_shape`, or [b, *local_shape].
        grad: a tensor of `layout.local_shape`, or one for each of the b parameters; none where an engine has reduced an
            image of it only.
        key: see below.

    Attributes:
        param: [n] or [b, n] values to update in place; padding is not among them.
        key: number of the parameter, the same on every rank and mesh; seeds of randomness contain it.  Of a stack, that
            of its first one.
    """

    def __init__(self, layout: Layout, param: Tensor, grad: Tensor | Sequence[Tensor], key: int = 0) -> None:
        self.layout = layout
        self.key = key
        self._lead = param.shape[: param.dim() - len(layout.local_shape)]
        self.param = self.flat(param)
        self._grads = [grad] if isinstance(grad, Tensor) else list(grad)

    @property
    def grad(self) -> Tensor:
        """Gradient, shaped like `param`, in float32 or wider; not to be written.

        Of low-precision and of stacked gradients every read is a new copy, so that none is kept alive between rounds.

        Raises:
            RuntimeError: an engine has reduced an image of it only.
        """
        grads = self._grads
        if not grads:
            raise RuntimeError(
                f"the gradient of the parameter of shape {self.layout.shape} was reduced as a low-rank image, but the "
                "step needs all of it. A hyper-parameter (update_proj_gap) was changed between backward and step: "
                "change it after the step."
            )
        joined = torch.stack(grads) if len(grads) > 1 else grads[0].view((*self._lead, *self.layout.local_shape))
        return self.flat(joined).to(wide(self.param.dtype))

    def new_grad(self) -> Tensor:
        """The gradient in a new tensor, which may be written."""
        return self.grad if self._grad_is_copy else self.grad.clone()

    def squared_grad(self, eps: float) -> Tensor:
        """Square of the gradient plus `eps`, in a new tensor shaped like `param`."""
        squared = self.grad.square_() if self._grad_is_copy else self.grad.square()
        return squared.add_(eps)

    @property
    def _grad_is_copy(self) -> bool:
        return len(self._grads) > 1 or self._grads[0].dtype != wide(self.param.dtype)

    def flat(self, tensor: Tensor) -> Tensor:
        """The prefix of local tensors that is data, as a view: shaped like `param`.

        Args:
            tensor: of `layout.local_shape`, or [b, *local_shape].
        """
        return tensor.view(*self._lead, self.layout.max_local)[..., : self.layout.num_local]

    def square_sum(self, x: Tensor) -> Sum:
        """Squared Euclidean norm of the whole tensor.

        Args:
            x: [n] or [b, n] values on this rank.
        Returns:
            Request that resolves to [1] or [b, 1].
        """
        return Sum(square_sum(x), self.layout.axes)
