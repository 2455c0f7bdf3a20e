"""Gradient checkpointing of models whose lower layers are frozen.

Reentrant checkpointing runs a segment without a graph and lets its output need a gradient if an input does.  Above
frozen layers no input does, so that the graph is cut there and nothing in the segment gets a gradient.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from colossal_bcd.sharding import Mesh

logger = logging.getLogger(__name__)

_MESSAGE = "gradient checkpointing uses use_reentrant=False: the reentrant kind needs gradients below the block"
_state = {"kept": False, "said": False}


def keep_checkpoints_whole() -> None:
    """From now on run a reentrant checkpoint none of whose inputs needs a gradient as a non-reentrant one.

    It then has the gradients that it would have without checkpointing, whoever calls `torch.utils.checkpoint`: a model,
    transformers, ColossalAI, `checkpoint_sequential`.  All other checkpoints are left alone.
    """
    if not _state["kept"]:
        _state["kept"] = True
        CheckpointFunction.apply = classmethod(_apply)  # type: ignore[assignment]


def _apply(cls: Any, function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    needs = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    if needs or cls is not CheckpointFunction or not torch.is_grad_enabled():
        return super(CheckpointFunction, cls).apply(function, preserve_rng_state, *args)
    _say()
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def prefer_non_reentrant(model: nn.Module) -> None:
    """Switch a model of transformers that checkpoints to `use_reentrant=False`, also where segments share layers.

    Its embeddings' output then needs no gradient, for which transformers 5 asks whatever the kind: backward would run
    through all layers.  See `keep_checkpoints_whole` for all others.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "_require_grads_hook"):
            module.disable_input_require_grads()
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            keywords = {**function.keywords, "use_reentrant": False}
            module._gradient_checkpointing_func = functools.partial(function.func, *function.args, **keywords)
            _say()


def _say() -> None:
    if not _state["said"]:
        _state["said"] = True
        if Mesh().is_first:
            logger.info(_MESSAGE)
