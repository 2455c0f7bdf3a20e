"""Row and column statistics of a low-rank image, which is a matrix with a layout of its own.

R, C, k as in `sharding.matrix`; q: rank; A, B: shape of the whole image; a, b: of what this rank holds of it.
"""

from __future__ import annotations

from torch import Tensor

from colossal_bcd.sharding.layout import Layout
from colossal_bcd.sharding.low_rank import LowRank, Side
from colossal_bcd.sharding.matrix import Matrices, Means, mean_of
from colossal_bcd.sharding.rounds import Combined, Sum


class LowRankView:
    """What `LowRank.project` resolves to, as a matrix whose rows or columns are divided over ranks.

    - right, [R, q]: rows follow the rows of the parameter; the rank on whose slice a row begins holds it.
    - left, [q, C]: columns follow the columns of the parameter's shard, divided once more over the slice's axis.
    - full, [q, q]: whole on every rank.

    Args:
        layout: of a tensor of two dims (see `Layout.as_matrix`).
        side: see above.
        rank: q.
    """

    def __init__(self, layout: Layout, side: Side, rank: int) -> None:
        matrices = Matrices(layout)
        self._low_rank = LowRank(layout, side, rank)
        self.held = self._low_rank.shape
        """a, b."""
        self.side = side
        self.shape = layout.shape[0] if side == "right" else rank, layout.shape[1] if side == "left" else rank
        """A, B."""
        # Sums over rows need the ranks that hold other rows, sums over columns those that hold other columns.
        self._over_rows = matrices.zero_axes + matrices.col_axes if side == "right" else ()
        self._over_columns = matrices.zero_axes + matrices.row_axes if side == "left" else ()

    @property
    def numel(self) -> int:
        """Values of the whole image."""
        return self.shape[0] * self.shape[1]

    def square_sum(self, x: Tensor) -> Sum:
        """Squared Euclidean norm of the whole image.

        Args:
            x: [a, b].
        Returns:
            Request that resolves to a scalar.
        """
        return self._low_rank.square_sum(x)

    def means(self, x: Tensor) -> Combined:
        """Request the row and column means of the whole image.

        Args:
            x: [a, b].
        Returns:
            Request that resolves to `Means` with row [a], col [b] and no total.
        """
        row = Sum(x.sum(1), self._over_columns)
        col = Sum(x.sum(0), self._over_rows)
        return Combined((row, col), lambda row, col: Means(row / self.shape[1], col / self.shape[0], None))

    def normaliser(self, row: Tensor, col: Tensor, total: Tensor | None) -> Tensor:
        """Mean of the image, a scalar, from the means that are whole on this rank (see `Matrices.normaliser`)."""
        assert total is None
        return mean_of(row) if self._over_columns else mean_of(col)

    def scale_(self, x: Tensor, row: Tensor, col: Tensor) -> Tensor:
        """Multiply every value by the factor of its row, [a], and that of its column, [b], in place."""
        return x.mul_(row.unsqueeze(1)).mul_(col)
