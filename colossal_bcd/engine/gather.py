"""Collects updated weights from the ranks that own their parts, in buckets fixed by layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.sharding.packing import pack


class PendingGather:
    """One bucket on its way; `wait` writes it into the parameters, once."""

    def __init__(
        self, params: Sequence[Parameter], lengths: Sequence[int], row: Tensor, buffer: Tensor, work: dist.Work | None
    ) -> None:
        self._params, self._lengths, self._buffer, self._work = params, lengths, buffer, work
        # A collective under way does not own what it sends.
        self._row = row
        self._written = [(param._version, param.data_ptr()) for param in params]

    def wait(self) -> None:
        """Block until the bucket has arrived and its parameters hold the new values.

        Raises:
            ValueError: one was written meanwhile, from its values before the step.
        """
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        for param, written in zip(self._params, self._written, strict=True):
            if written != (param._version, param.data_ptr()):
                raise ValueError(
                    f"overlap_allgather: a weight of shape {tuple(param.shape)} was written from outside while the "
                    "step's new values were on their way to it, expected that after optimizer.wait_for_weights()."
                )
        offset = 0
        for param, length in zip(self._params, self._lengths, strict=True):
            rows = self._buffer[:, offset : offset + length].reshape(-1)
            param.data.copy_(rows[: param.numel()].view(param.shape))
            offset += length
        del self._row, self._buffer


Defer: TypeAlias = Callable[[Parameter, PendingGather], None]


def gather_weights(
    pairs: Sequence[tuple[Parameter, Tensor]],
    groups: Sequence[dist.ProcessGroup],
    bucket_size: int,
    *,
    defer: Defer | None,
) -> None:
    """Write every rank's part of every parameter into the parameters of all ranks.

    Args:
        pairs: working parameter and this rank's flat part of it [ceil(n / W)], in the same order on every rank.
        groups: the process groups whose product, W ranks, divides the parts.
        bucket_size: largest number of values that a rank sends in one collective.
        defer: return at once, and hand each parameter's gather to this, which has to wait for it before its use; None:
            wait here.
    """
    for bucket in pack(pairs, lambda pair: pair[1].numel(), bucket_size, lambda pair: pair[0].dtype):
        _gather(bucket, groups, defer)


def _gather(bucket: list[tuple[Parameter, Tensor]], groups: Sequence[dist.ProcessGroup], defer: Defer | None) -> None:
    params = [param for param, _ in bucket]
    lengths = [part.numel() for _, part in bucket]
    row = torch.cat([part.to(params[0].device, params[0].dtype) for _, part in bucket])
    buffer, work = gather_rows(row, groups)
    pending = PendingGather(params, lengths, row, buffer, work)
    if defer is None:
        pending.wait()
        return
    for param in params:
        defer(param, pending)


def gather_rows(row: Tensor, groups: Sequence[dist.ProcessGroup]) -> tuple[Tensor, dist.Work | None]:
    """Begin to collect one row of each rank.

    Args:
        row: [n], the same length on every rank; must stay alive until the work is done.
        groups: see `gather_weights`.
    Returns:
        [W, n], filled when the work is done, and the work.
    """
    sizes = [dist.get_world_size(group) for group in groups]
    ranks = [dist.get_rank(group) for group in groups]
    buffer = row.new_empty(math.prod(sizes), len(row))
    work = None
    # The innermost group fills its block of rows first; each outer group then exchanges whole blocks.
    send = row
    for level in reversed(range(len(groups))):
        block = math.prod(sizes[level:])
        first = sum(rank * math.prod(sizes[i + 1 :]) for i, rank in enumerate(ranks[:level]))
        receive = buffer[first : first + block].view(-1)
        work = dist.all_gather_into_tensor(receive, send.view(-1), group=groups[level], async_op=level == 0)
        send = receive
    return buffer, work
