"""What a rule sees of one parameter.  n: values of data on this rank."""

from __future__ import annotations

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
    """Squared Euclidean norm of a flat tensor, a scalar in float32 or wider that keeps its digits at any length."""
    x = x.to(wide(x.dtype))
    whole = x.numel() // ROW * ROW
    norms = torch.linalg.vector_norm(x[:whole].view(-1, ROW), dim=1)
    return torch.dot(norms, norms) + torch.dot(x[whole:], x[whole:])


class ShardView:
    """The data of one parameter on this rank, flat, and requests for quantities of the whole parameter.

    Attributes:
        param: [n] values to update in place; padding is not among them.
        key: number of the parameter, the same on every rank and mesh; seeds of randomness contain it.
    """

    def __init__(self, layout: Layout, param: Tensor, grad: Tensor | None, key: int = 0) -> None:
        self.layout = layout
        self.key = key
        self.param = self.flat(param)
        self._grad = None if grad is None else self.flat(grad)

    @property
    def grad(self) -> Tensor:
        """[n] gradient, in float32 or wider; not to be written.

        Of a low-precision gradient every read is a new copy, so that none is kept alive between rounds.

        Raises:
            RuntimeError: an engine has reduced an image of it only.
        """
        if self._grad is None:
            raise RuntimeError(
                f"the gradient of the parameter of shape {self.layout.shape} was reduced as a low-rank image, but the "
                "step needs all of it. A hyper-parameter (update_proj_gap) was changed between backward and step: "
                "change it after the step."
            )
        return self._grad.to(wide(self.param.dtype))

    def squared_grad(self, eps: float) -> Tensor:
        """[n] square of the gradient plus `eps`, in a new tensor."""
        return self.grad.square().add_(eps)

    def flat(self, tensor: Tensor) -> Tensor:
        """[n] prefix of a local tensor (of `layout.local_shape`) that is data, as a view."""
        return tensor.view(-1)[: self.layout.num_local]

    def square_sum(self, x: Tensor) -> Sum:
        """Squared Euclidean norm of the whole tensor.

        Args:
            x: [n] values on this rank.
        Returns:
            Request that resolves to a scalar.
        """
        return Sum(square_sum(x), self.layout.axes)
