"""Gradients that sequence parallelism leaves partial."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from colossalai.shardformer.layer.utils import SeqParallelUtils
from torch import Tensor
from torch.nn import Parameter


def add_sequence_parallel(
    model: Any, tp_group: dist.ProcessGroup | None, params: Iterable[Parameter], grads: Mapping[Parameter, Tensor]
) -> None:
    """Add the partial gradients of some replicated parameters over the tensor-parallel ranks, in place.

    Args:
        model: ColossalAI's wrapper; a pipeline's adds them itself.
        tp_group: the ranks.
        params: those that are trained now.
        grads: their gradients, where they have one.
    """
    partial = _partial(model, params, grads)
    if partial:
        SeqParallelUtils.allreduce_partial_data_grad(process_group=tp_group, grads=partial)


def part_of_sum(
    model: Any, tp_group: dist.ProcessGroup | None, params: Iterable[Parameter], grads: Mapping[Parameter, Tensor]
) -> None:
    """Undo `add_sequence_parallel`: divide sums into equal parts, which it adds up again; arguments as there."""
    for grad in _partial(model, params, grads):
        grad.div_(dist.get_world_size(tp_group))


def _partial(model: Any, params: Iterable[Parameter], grads: Mapping[Parameter, Tensor]) -> list[Tensor]:
    shard_config = getattr(model, "shard_config", None)
    if shard_config is None or not shard_config.enable_sequence_parallelism or model.stage_manager is not None:
        return []
    if shard_config.sequence_parallelism_mode not in ("split_gather", "ring"):
        return []
    return [grads[param] for param in params if SeqParallelUtils.is_sp_partial_derived_param(param) and param in grads]
