"""A second moment kept as row and column averages (Shazeer and Stern, arXiv 1804.04235, section 3).

k, m, c: as in `sharding.matrix`; n: values of data on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colossal_bcd.optim.state.spec import Shaped, State, StateSpec
from colossal_bcd.sharding import LowRank, Means, matrices_of
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


def capped_(x: Tensor) -> Tensor:
    """Second moments, at most half of the largest number of their dtype, in place; what is not a number stays so.

    Squares of float32 gradients above 1.8e19 are infinite, and what divides by a mean of them is no number.  Capped,
    they have the sign and the order of size of what float64 gives, and clipping bounds the update as there.
    """
    return x.clamp_(max=torch.finfo(x.dtype).max / 2)


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

    def update_(self, means: Means, weight: float) -> None:
        """Give new means the weight `weight`, and the average so far the rest."""
        self._row.lerp_(capped_(means.row), weight)
        self._col.lerp_(capped_(means.col), weight)
        if self._total is not None and means.total is not None:
            self._total.lerp_(capped_(means.total), weight)

    def precondition_(self, x: Tensor) -> Tensor:
        """Divide by the root of the rank-one estimate row x col / mean, in place.

        Args:
            x: [n] or [b, n] values.
        """
        norm = self._statistics.normaliser(self._row, self._col, self._total)
        # Not (row / norm).rsqrt(): beside large gradients the quotient of a row of zeros is zero itself.
        return self._statistics.scale_(x, self._row.rsqrt().mul_(norm.sqrt()), self._col.rsqrt())
