"""Low-rank updates that every replica applies itself: images of steps are gathered instead of weights.

W: ranks that share masters and states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.engine.gather import gather_rows
from colossal_bcd.engine.masters import ShardedMasters
from colossal_bcd.low_rank import ReducedGradientOptimizer, ReplicatedUpdate
from colossal_bcd.optim.state.rounding import LOW_PRECISION, round_into
from colossal_bcd.sharding import Layout, wide
from colossal_bcd.sharding.packing import pack


@torch.no_grad()
def replicate(optimizer: ReducedGradientOptimizer, masters: ShardedMasters, bucket_size: int) -> set[Parameter]:
    """Apply the low-rank updates of a step to whole shards, the same on all W ranks.

    Every rank computes from the same gathered values by the same operations and rounds with the same random stream, so
    replicas stay bitwise equal.  A float32 copy of one shard at a time exists.

    Args:
        optimizer: that has just made the step; its `replicated_updates` are taken.
        masters: of what it trains; parts of the weights that were updated are copied into them.
        bucket_size: largest number of values that a rank sends in one collective.
    Returns:
        The parameters that are done.
    """
    made, optimizer.replicated_updates = optimizer.replicated_updates or {}, {}
    replicated_updates = {
        param: made[optimizer.key_of(master)]
        for param, master in masters.of.items()
        if optimizer.key_of(master) in made
    }
    streams = optimizer.streams()

    def numel(param: Parameter) -> int:
        return replicated_updates[param].image.part_numel

    for bucket in pack(replicated_updates, numel, bucket_size, lambda param: param.dtype):
        for param, step in zip(
            bucket, _gather({p: replicated_updates[p] for p in bucket}, masters.groups), strict=True
        ):
            _update(param, masters.shard_layout(param), replicated_updates[param], step, streams.get(masters.of[param]))
    masters.active_set.follow(replicated_updates)
    return set(replicated_updates)


def _gather(bucket: dict[Parameter, ReplicatedUpdate], groups: Sequence[dist.ProcessGroup]) -> list[Tensor]:
    """Whole images of the shards' steps, in the dtype of their arithmetic.

    16-bit weights are updated by steps rounded to bfloat16, 2^-9 of themselves at most: float16 would flush small ones.
    What all ranks hold in full does not travel, but is rounded alike.
    """
    first = next(iter(bucket))
    dtype = torch.bfloat16 if first.dtype in LOW_PRECISION else first.dtype
    parts = [d.image.padded(d.step) for d in bucket.values() if d.image.divided]
    row = torch.cat([torch.empty(0, dtype=dtype, device=first.device), *(p.to(first.device, dtype) for p in parts)])
    rows = iter(())
    if parts:
        buffer, work = gather_rows(row, groups)
        if work is not None:
            work.wait()
        rows = iter(buffer.split([len(part) for part in parts], dim=1))
    return [
        (d.image.joined(next(rows)) if d.image.divided else d.step.to(first.device, dtype)).to(wide(first.dtype))
        for d in bucket.values()
    ]


def _update(param: Parameter, layout: Layout, descent: ReplicatedUpdate, step: Tensor, stream: int | None) -> None:
    target = param.data.view(-1)[: layout.num_local]
    weight = target.to(wide(target.dtype))
    descent.apply(weight, step)
    if stream is not None:
        round_into(target, weight, layout, stream)
    elif weight is not target:
        target.copy_(weight)
