"""What a plugin says about bitsandbytes' optimizers when it takes one over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter

from colossal_bcd.engine.masters import ShardedMasters
from colossal_bcd.optim.foreign.bitsandbytes_states import (
    describe_misaligned,
    misaligned,
    remember_weights,
    require_whole_chunks,
)
from colossal_bcd.sharding import Layout

logger = logging.getLogger(__name__)


def require_quantized_shares(
    optimizer: Any, masters: ShardedMasters, layouts: Mapping[Parameter, Layout], names: Mapping[int, str]
) -> None:
    """Let overrides follow the weights, and say once which weights cannot train as on one process.

    Args:
        optimizer: any, before its param groups hold masters; only those of bitsandbytes change.
        masters: of the engine.
        layouts: tensor-parallel layout of every weight on this rank.
        names: of every weight by id.
    Raises:
        ValueError: what is overridden needs whole weights.
    """
    remember_weights(optimizer, [group["params"] for group in optimizer.param_groups])
    divided = any(layout.split is not None and layout.split.size > 1 for layout in layouts.values())
    require_whole_chunks(optimizer, names, divided or masters.num_shards > 1)
    # One rank of each pipeline stage.
    others = [layout for layout in layouts.values() if layout.split is not None and layout.split.rank > 0]
    params = misaligned(optimizer, layouts)
    if params and masters.shard == 0 and not others:
        logger.warning(describe_misaligned(optimizer, params, names))
