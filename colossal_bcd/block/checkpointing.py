"""Gradient checkpointing of models whose lower layers are frozen."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


def prefer_non_reentrant(model: nn.Module) -> None:
    """Switch a model of transformers that checkpoints to `use_reentrant=False`.

    Reentrant checkpointing cuts the graph where a segment's input needs no gradient: above frozen layers.
    """
    changed = False
    module: Any
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant", True):
            keywords = {**checkpoint.keywords, "use_reentrant": False}
            module._gradient_checkpointing_func = functools.partial(checkpoint.func, *checkpoint.args, **keywords)
            changed = True
    if changed:
        logger.info(
            "gradient checkpointing uses use_reentrant=False: the reentrant kind needs gradients below the block"
        )
