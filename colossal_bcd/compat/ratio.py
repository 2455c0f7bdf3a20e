"""BAdam's parameter-ratio form under the names of its releases."""

from __future__ import annotations

from colossal_bcd.block import BlockOptimizerRatio as BlockOptimizerRatio


class SparseGradOptimizer(BlockOptimizerRatio):
    """`colossal_bcd.BlockOptimizerRatio` under its name in BAdam's first release."""
