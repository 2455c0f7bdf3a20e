"""What a rule sees of one parameter, or of several of equal layout, or of their low-rank gradients.

n: values of data on this rank; b: number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.lazy import (
    Columns,
    Lazy,
    Number,
    Rows,
    Run,
    Runs,
    as_lazy,
    square_sum,
    square_sums,
    subtract_,
    wide,
)
from colossal_bcd.sharding.matrix import Matrices, matrices_of
from colossal_bcd.sharding.rounds import Combined, Rounds, Sum


def sum_of_squares(x: Tensor | Lazy, axes: tuple[str, ...], runs: Runs | None = None) -> Sum:
    """Request the squared Euclidean norm over the last dim and all ranks of `axes` (see `square_sum`)."""
    return Sum(square_sum(x, runs), axes, exact=as_lazy(x).first.dtype == torch.float64)


class Statistics(Protocol):
    """Row and column statistics of the matrices that a flat gradient is: `Matrices`, or `LowRank`."""

    def means(self, x: Tensor | Lazy) -> Combined:
        """Request the `Means` of whole matrices from this rank's values."""

    def normaliser(self, row: Tensor, col: Tensor, total: Tensor | None) -> Tensor:
        """Mean of the matrix to which each row belongs."""

    def operands(self, row: Tensor, col: Tensor) -> tuple[Rows, Columns]:
        """What each row and each column has, as operands of a `Lazy`."""

    def runs(self, size: int) -> Sequence[Run]:
        """The structure of flat values, in chunks of about `size`."""


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
    def stored_grad(self) -> Tensor:
        """The gradient as operand of a `Lazy`, which computes with it in float32 or wider: of low precision, maybe."""

    @property
    def numel(self) -> int:
        """Values of the whole gradient of one parameter: what a mean divides by."""

    @property
    def statistics(self) -> Statistics:
        """Row and column statistics of tensors shaped like `grad`."""

    def square_sum(self, x: Tensor | Lazy) -> Sum:
        """Request the squared Euclidean norm of the whole of values shaped like `grad`: [1] or [b, 1], float64."""

    def subtract(
        self, step: Tensor | Lazy, *, lr: Number = 1.0, decay: Number = 0.0, decay_first: bool = True
    ) -> Rounds:
        """Subtract `lr * step` from the weight, which shrinks by its part `decay` before that, or after it.

        Args:
            step: shaped like `grad`; not written.
            lr: factor; a number, or a tensor of one value for each parameter of a stack.
            decay: in [0, 1]; as `lr`.
            decay_first: whether the weight shrinks before the step is subtracted.
        """


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
    def stored_grad(self) -> Tensor:
        """Gradient, shaped like `param`, not to be written.

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
        if len(grads) > 1:
            grads[:] = [torch.stack(grads)]
        joined = self.flat(grads[0])
        return joined if wide(joined.dtype) == wide(self.param.dtype) else joined.to(wide(self.param.dtype))

    @property
    def grad(self) -> Tensor:
        """See `View`; of low-precision gradients every read is a new copy."""
        return self.stored_grad.to(wide(self.param.dtype))

    def flat(self, tensor: Tensor) -> Tensor:
        """The prefix of local tensors that is data, as a view: shaped like `param`.

        Args:
            tensor: with or without padding behind the `num_local` values; of a stack [b, ...].
        """
        return tensor.view(*self.lead, -1)[..., : self.layout.num_local]

    def square_sum(self, x: Tensor | Lazy) -> Sum:
        """Squared Euclidean norm of the whole tensor.

        Args:
            x: [n] or [b, n] values on this rank.
        Returns:
            Request that resolves to [1] or [b, 1], float64.
        """
        return sum_of_squares(x, self.layout.axes, self._runs)

    def norms_of_update(self, direction: Tensor | Lazy) -> tuple[Sum, Sum]:
        """Squared Euclidean norms of the whole parameter and of the direction of its update, as of `square_sum`.

        Args:
            direction: [n] or [b, n] values on this rank.
        Returns:
            Requests that resolve to [1] or [b, 1], float64: the parameter's, and the direction's.
        """
        exact = as_lazy(direction).first.dtype == torch.float64
        of_direction, of_weight = square_sums(direction, self.param)
        return Sum(of_weight, self.layout.axes, exact=exact), Sum(of_direction, self.layout.axes, exact=exact)

    def subtract(
        self, step: Tensor | Lazy, *, lr: Number = 1.0, decay: Number = 0.0, decay_first: bool = True
    ) -> Rounds:
        """See `View`; asks for nothing."""
        subtract_(self.param, as_lazy(step), self._runs, lr=lr, decay=decay, decay_first=decay_first)
        yield from ()

    def _runs(self, size: int) -> list[Run]:
        return self.statistics.runs(size)
