"""What a rule sees of one parameter, or of several of equal layout, or of their low-rank gradients.

n: values of data on this rank; b: number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.matrix import Matrices, matrices_of
from colossal_bcd.sharding.rounds import Combined, Rounds, Sum


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are computed and reduced: float64 stays, everything else is float32.

    Raises:
        TypeError: it is complex, and would lose its imaginary part.
    """
    if dtype.is_complex:
        raise TypeError(f"got a tensor of {dtype}, expected real numbers. Hold it as torch.view_as_real gives it.")
    return torch.float64 if dtype == torch.float64 else torch.float32


LEAST_CHUNK, MOST_CHUNK = 2**11, 2**16
"""Values squared at once in float64 on a CPU: their copy stays in a core's cache."""


def square_sum(x: Tensor) -> Tensor:
    """Squared Euclidean norm over the last dim, which stays with length 1, in float64.

    Squares of float32 values below 1e-23 are 0 in float32 and those above 1.8e19 infinite; in float64 all are what they
    are, so that a norm is zero for zeros only and finite for all finite values.
    """
    if x.device.type != "cpu":
        # These kernels of accelerators widen values as they read them: one for all tensors, and no copy.
        norms = torch._foreach_norm(list(x.reshape(math.prod(x.shape[:-1]), x.shape[-1])), 2, dtype=torch.float64)
        return torch.stack(norms).square_().view(*x.shape[:-1], 1)
    # A sixteenth at a time, so that the copy is an eighth of float32 values.
    size = max(LEAST_CHUNK, min(x.numel() // 16, MOST_CHUNK)) // max(math.prod(x.shape[:-1]), 1)
    parts = [_wide_squares(part).sum(-1, keepdim=True) for part in x.split(max(size, 1), -1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1).sum(-1, keepdim=True)


def _wide_squares(x: Tensor) -> Tensor:
    copy = x.to(torch.float64)
    return x.square() if copy is x else copy.square_()


def sum_of_squares(x: Tensor, axes: tuple[str, ...]) -> Sum:
    """Request the squared Euclidean norm over the last dim and all ranks of `axes` (see `square_sum`)."""
    return Sum(square_sum(x), axes, exact=x.dtype == torch.float64)


class Statistics(Protocol):
    """Row and column statistics of the matrices that a flat gradient is: `Matrices`, or `LowRank`."""

    def means(self, x: Tensor) -> Combined:
        """Request the `Means` of whole matrices from this rank's values."""

    def normaliser(self, row: Tensor, col: Tensor, total: Tensor | None) -> Tensor:
        """Mean of the matrix to which each row belongs."""

    def scale_(self, x: Tensor, row: Tensor, col: Tensor) -> Tensor:
        """Multiply every value by the factor of its row and that of its column, in place."""


class View(Protocol):
    """What a rule sees: a parameter (`ShardView`), or its low-rank gradient (`LowRankView`).

    The values that a rule computes with are flat: [n], or [b, n] of a stack.  Those of a low-rank gradient are fewer
    than the weight's, which is `weight.param` in either case.
    """

    @property
    def weight(self) -> ShardView:
        """The parameter itself."""

    @property
    def grad(self) -> Tensor:
        """[n] or [b, n] gradient in float32 or wider; not to be written."""

    @property
    def numel(self) -> int:
        """Values of the whole gradient of one parameter: what a mean divides by."""

    @property
    def statistics(self) -> Statistics:
        """Row and column statistics of tensors shaped like `grad`."""

    def new_grad(self) -> Tensor:
        """The gradient in a new tensor, which may be written."""

    def squared_grad(self, eps: float) -> Tensor:
        """Square of the gradient plus `eps`, in a new tensor."""

    def square_sum(self, x: Tensor) -> Sum:
        """Request the squared Euclidean norm of the whole of a tensor shaped like `grad`: [1] or [b, 1], float64."""

    def subtract(
        self, step: Tensor, *, lr: float = 1.0, decay: float | Tensor = 0.0, decay_first: bool = True
    ) -> Rounds:
        """Subtract `lr * step` from the weight, which shrinks by its part `decay` before that, or after it.

        Args:
            step: shaped like `grad`; not written.
            lr: factor.
            decay: in [0, 1]; a number, or a tensor of one value for each parameter of a stack.
            decay_first: whether the weight shrinks before the step is subtracted.
        """


def decayed(weight: Tensor, decay: float | Tensor, first: bool, subtract: Callable[[], Any]) -> None:
    """Shrink a weight in place and subtract a step, in the order that a rule asks for (see `View.subtract`)."""
    keep = None if not isinstance(decay, Tensor) and decay == 0 else 1 - decay
    if keep is not None and first:
        weight.mul_(keep)
    subtract()
    if keep is not None and not first:
        weight.mul_(keep)


class ShardView:
    """The data of one parameter on this rank, flat, and requests for quantities of the whole parameter.

    A stack of b parameters of equal layout has the same view with a leading dim: [b, n] instead of [n].

    Args:
        layout: of each parameter.
        param: what the rank stores, of any shape, with or without padding; of a stack [b, ...].
        grad: a tensor of the same shape, or one for each of the b parameters; none where an engine has reduced a
            low-rank gradient only.
        keys: numbers of the parameters.
        lead: (b,) of a stack.

    Attributes:
        param: [n] or [b, n] values to update in place; padding is not among them.
        keys: numbers of the parameters, the same on every rank and mesh; seeds of randomness contain them.
    """

    def __init__(
        self,
        layout: Layout,
        param: Tensor,
        grad: Tensor | Sequence[Tensor],
        keys: Sequence[int] = (0,),
        lead: tuple[int, ...] = (),
    ) -> None:
        self.layout = layout
        self.keys = keys
        self.lead = lead
        self.param = self.flat(param)
        self._grads = [grad] if isinstance(grad, Tensor) else list(grad)

    @property
    def weight(self) -> ShardView:
        """See `View`."""
        return self

    @property
    def numel(self) -> int:
        """Values of the whole parameter."""
        return self.layout.numel

    @property
    def statistics(self) -> Matrices:
        """See `View`; of tensors of two or more dims."""
        return matrices_of(self.layout)

    @property
    def grad(self) -> Tensor:
        """Gradient, shaped like `param`, in float32 or wider; not to be written.

        Of low-precision and of stacked gradients every read is a new copy, so that none is kept alive between rounds.

        Raises:
            RuntimeError: an engine has reduced a low-rank gradient only.
        """
        grads = self._grads
        if not grads:
            raise RuntimeError(
                f"the gradient of the parameter of shape {self.layout.shape} was reduced as a low-rank one, but the "
                "step needs all of it. A hyper-parameter (update_proj_gap) was changed between backward and step: "
                "change it after the step."
            )
        joined = torch.stack(grads) if len(grads) > 1 else grads[0]
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
            tensor: with or without padding behind the `num_local` values; of a stack [b, ...].
        """
        return tensor.view(*self.lead, -1)[..., : self.layout.num_local]

    def square_sum(self, x: Tensor) -> Sum:
        """Squared Euclidean norm of the whole tensor.

        Args:
            x: [n] or [b, n] values on this rank.
        Returns:
            Request that resolves to [1] or [b, 1], float64.
        """
        return sum_of_squares(x, self.layout.axes)

    def subtract(
        self, step: Tensor, *, lr: float = 1.0, decay: float | Tensor = 0.0, decay_first: bool = True
    ) -> Rounds:
        """See `View`; asks for nothing."""
        decayed(self.param, decay, decay_first, lambda: self.param.add_(step, alpha=-lr))
        yield from ()
