"""BAdam's parameter-ratio form under the names of its releases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter

from colossal_bcd import block

_ORDER = (
    "update_ratio", "verbose", "switch_every", "preserve_threshold", "param_update_ratios", "mask_mode", "lr", "betas",
    "eps", "optimizer_defaults", "keep_mask", "include_embedding", "include_lm_head",
)  # fmt: skip
"""Positional arguments of the original, after the parameters."""


class BlockOptimizerRatio(block.BlockOptimizerRatio):
    """`colossal_bcd.BlockOptimizerRatio`, which takes every argument also by its position."""

    def __init__(
        self,
        param_groups: Iterable[Any],
        named_parameters_list: Iterable[tuple[str, Parameter]],
        *values: Any,
        **flat: Any,
    ) -> None:
        super().__init__(param_groups, named_parameters_list, **dict(zip(_ORDER, values, strict=False)), **flat)


class SparseGradOptimizer(BlockOptimizerRatio):
    """`BlockOptimizerRatio` under its name in BAdam's first release."""
