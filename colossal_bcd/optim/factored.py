"""A second moment kept as row and column averages (Shazeer and Stern, arXiv 1804.04235, section 3).

k, m, c: as in `sharding.matrix`; n: values of data on this rank.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from colossal_bcd.optim.math import capped_
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec
from colossal_bcd.sharding import Columns, LowRank, Means, Number, Rows, matrices_of
from colossal_bcd.sharding.view import Statistics


def is_factored(layout: Shaped, min_dim_size: int) -> bool:
    """Whether a gradient has matrices whose both dims have at least `min_dim_size`."""
    return len(layout.shape) >= 2 and min(layout.shape[-2:]) >= min_dim_size and layout.numel > 0


def factored_spec(layout: Shaped, name: str) -> dict[str, StateSpec]:
    """State of one factored average: `<name>_row`, `<name>_col`, and `<name>_total` where the rank needs it."""
    if isinstance(layout, LowRank):
        rows, columns = layout.local_shape
        return {
            f"{name}_row": StateSpec(kind="row", shape=(rows,), side=layout.side),
            f"{name}_col": StateSpec(kind="column", shape=(columns,), side=layout.side),
        }
    matrices = matrices_of(layout)
    spec = {
        f"{name}_row": StateSpec(kind="row", shape=(matrices.rows.count,), total=f"{name}_total"),
        f"{name}_col": StateSpec(kind="column", shape=(matrices.matrices.count, matrices.c)),
    }
    if matrices.needs_total:
        spec[f"{name}_total"] = StateSpec(kind="column", shape=(matrices.matrices.count,))
    return spec


class FactoredAverage:
    """The exponential average of a non-negative quantity, as rows, columns and their normaliser.

    Args:
        statistics: of the view.
        state: has the entries that `factored_spec` declares under `name`.
        name: of the average.
    """

    def __init__(self, statistics: Statistics, state: State, name: str) -> None:
        self._statistics = statistics
        self._row, self._col = state[f"{name}_row"], state[f"{name}_col"]
        self._total = state.get(f"{name}_total")

    def update_(self, means: Means, eps: float, weight: float) -> FactoredAverage:
        """Give new means plus `eps` the weight `weight`, and the average so far the rest; returns itself."""
        self._row.lerp_(capped_(means.row + eps), weight)
        self._col.lerp_(capped_(means.col + eps), weight)
        if self._total is not None and means.total is not None:
            self._total.lerp_(capped_(means.total + eps), weight)
        return self

    def inverse_root(self) -> tuple[Rows, Columns]:
        """What divides by the root of the rank-one estimate row x col / mean, as operands of `preconditioned`."""
        norm = self._statistics.normaliser(self._row, self._col, self._total)
        # Not (row / norm).rsqrt(): beside large gradients the quotient of a row of zeros is zero itself.
        return self._statistics.operands(self._row.rsqrt().mul_(norm.sqrt()), self._col.rsqrt())


Root: TypeAlias = tuple[Rows, Columns] | tuple[Tensor]
"""The root of a second moment, as operands of `preconditioned`: of a factored one, or a whole one itself."""


def times(root: Root, factor: Tensor) -> tuple[Root, dict[str, Tensor]]:
    """Operands and numbers of `preconditioned` that also multiply by a factor of each parameter, [1] or [b, 1]."""
    if len(root) == 1:
        return root, {"factor": factor}
    rows, columns = root
    return (Rows(rows.values * factor), columns), {}


def preconditioned(x: Tensor, *root: Tensor, factor: Number | None = None) -> Tensor:
    """Values divided by the root of a second moment, in a new tensor.

    Args:
        x: [n].
        root: inverse roots of rows and of columns, or the second moment itself.
        factor: of the result.
    """
    if len(root) == 1:
        update = root[0].rsqrt().mul_(x)
    else:
        row, col = root
        update = x.mul(row).mul_(col)
    return update if factor is None else update.mul_(factor)


def update_and_precondition_(exp_avg_sq: Tensor, grad: Tensor, *, eps: Number, share: Number) -> Tensor:
    """`preconditioned` by a whole second moment, which the squared gradient enters first with its share."""
    return preconditioned(grad, exp_avg_sq.lerp_(capped_(grad.square().add_(eps)), share))


def update_average_(
    exp_avg: Tensor, grad: Tensor, *root: Tensor, share: Number, factor: Number | None = None
) -> Tensor:
    """The average of updates, in place: `preconditioned` gradients enter with their share."""
    return exp_avg.lerp_(preconditioned(grad, *root, factor=factor), share)
