"""What every plugin does before and after ColossalAI wraps the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.block.gradient_checkpointing import keep_checkpoints_whole, prefer_non_reentrant
from colossal_bcd.block.trained import is_plain, trained_of
from colossal_bcd.booster.casts.fitness import Given, require_fit
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.booster.lora import adopt_adapters
from colossal_bcd.booster.same_options import require_same_options


def prepare(model: nn.Module, optimizer: Any, given: Given) -> Optimizer:
    """Cast the optimizer and settle what would fail later, before the first collective about weights."""
    adopt_adapters(model, optimizer)
    require_same_options(model, optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"boost: got an optimizer of type {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    trained = {id(param) for param in trained_of(optimizer).parameters()}
    foreign = trained - {id(param) for param in model.parameters()}
    if foreign:
        raise ValueError(
            f"boost: {len(foreign)} of the optimizer's {len(trained)} parameters are not in the model. Construct the "
            "optimizer from the parameters of the model that is boosted, after the model was changed or copied."
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and id(module.weight) in trained:
            raise ValueError(f"module {name!r} has sparse gradients, expected dense ones. Build it with sparse=False.")
    keep_checkpoints_whole()
    optimizer = cast(optimizer, measured=True)
    require_fit(optimizer, given)
    if isinstance(optimizer, (BlockOptimizer, BlockOptimizerRatio)):
        prefer_non_reentrant(model)
    return optimizer


@contextlib.contextmanager
def thawed(optimizer: Any) -> Iterator[None]:
    """Everything that will ever be trained requires grad while ColossalAI wraps the model; attaching freezes again."""
    params = [] if is_plain(optimizer) else trained_of(optimizer).parameters()
    before = [(param, param.requires_grad) for param in params]
    for param in params:
        param.requires_grad_(True)
    try:
        yield
    except BaseException:
        for param, trained in before:
            param.requires_grad_(trained)
        raise


@torch.no_grad()
def same_start(model: nn.Module, group: Any, *, buffers: bool = True) -> None:
    """Copy weights and buffers of the group's first rank to the others, as torch's DDP does.

    ZeRO's first gather does so for what is trained; what a block optimizer leaves frozen is never gathered.
    Without `buffers` every rank keeps its own.
    """
    if dist.get_world_size(group) > 1:
        source = dist.get_global_rank(group, 0)
        for tensor in [*model.parameters(), *(model.buffers() if buffers else ())]:
            dist.broadcast(tensor.data, source, group=group)
