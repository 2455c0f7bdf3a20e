"""Master weights of what is trained, sharded over ZeRO ranks, and the gather of weights from them.

W: ranks that share masters (1: not sharded).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.active_set import ActiveSet, follow
from colossal_bcd.optim.foreign.bitsandbytes_states import (
    describe_misaligned,
    misaligned,
    remember_weights,
    require_whole_chunks,
)
from colossal_bcd.sharding import Layout, wide
from colossal_bcd.sharding.packing import pack

logger = logging.getLogger(__name__)


class ShardedMasters:
    """This rank's part of every trained weight, in the precision in which it is updated.

    Args:
        active_set: has the masters: flat parts [slice_length], or shards in their shape if there are no groups.
        layouts: tensor-parallel layout of every parameter that may ever be trained here.
        groups: the process groups whose product is the W ranks; empty for none.
        low_precision: masters have the weights' own dtype instead of float32.
        offload: masters live on the CPU.
        whole_rows: see `slice_length`.
        chunk: see `slice_length`.
    """

    def __init__(
        self,
        active_set: ActiveSet,
        layouts: Mapping[Parameter, Layout],
        groups: Sequence[dist.ProcessGroup],
        *,
        low_precision: bool = False,
        offload: bool = False,
        whole_rows: bool = False,
        chunk: int = 1,
    ) -> None:
        self.active_set = active_set
        self._layouts, self.groups, self.whole_rows = layouts, tuple(groups), whole_rows
        self.chunk = chunk
        self._low_precision, self._offload = low_precision, offload
        self.num_shards = math.prod(dist.get_world_size(group) for group in groups)
        self.shard = 0
        for group in groups:  # of several groups, the last one counts fastest
            self.shard = self.shard * dist.get_world_size(group) + dist.get_rank(group)

    @property
    def of(self) -> dict[Parameter, Tensor]:
        """Master by working parameter."""
        return self.active_set.masters

    def layout(self, param: Parameter) -> Layout:
        """Layout of the parameter's master."""
        layout = self._layouts[param]
        if not self.groups:
            return layout
        return layout.sliced("zero", self.shard, self.num_shards, whole_rows=self.whole_rows, chunk=self.chunk)

    def dtype(self, param: Parameter) -> torch.dtype:
        """Dtype of the parameter's master."""
        return param.dtype if self._low_precision else wide(param.dtype)

    def follow(self, param: Parameter, master: Tensor) -> None:
        """Let a master have the weight's values, where that is not the rounded master; every rank takes its own part.

        Raises:
            ValueError: the weight has another shape now.
        """
        if master.data_ptr() == param.data_ptr():
            return
        if tuple(param.shape) != self._layouts[param].local_shape:
            raise ValueError(
                f"a weight of shape {self._layouts[param].local_shape} now has shape {tuple(param.shape)}, expected "
                "the same. Change a model's shapes before it is boosted."
            )
        weight = self.weight_of(param)
        alone = self.num_shards == 1 and not self._offload
        if alone and weight.dtype == master.dtype and weight.data_ptr() == param.data_ptr():
            # The weight is its own master; `param.data = other` has given it another memory.
            master.data = weight
        else:
            follow(master, weight.view(master.shape))

    def shard_layout(self, param: Parameter) -> Layout:
        """Layout of the working parameter."""
        return self._layouts[param]

    def load_gradients(self, grads: dict[Parameter, Tensor], *, partitioned: bool) -> None:
        """Move averaged gradients to the masters, in their dtype, freeing each low-precision one as it is cast.

        Args:
            grads: flat gradients by parameter, emptied: parts [slice_length] if `partitioned`, else whole [n].
            partitioned: see `grads`.
        """
        for param, master in self.of.items():
            master.grad = None
            grad = grads.pop(param, None)
            if grad is not None:
                if not partitioned and self.num_shards > 1:
                    grad = self._part(grad, master.numel())
                # A part must not keep the whole gradient alive.
                part = grad.numel() < grad.untyped_storage().nbytes() // grad.itemsize
                master.grad = grad.to(master.device, master.dtype, copy=part).view(master.shape)
            del grad

    @torch.no_grad()
    def write_back(self, bucket_size: int, *, defer: Defer | None, done: Collection[Parameter] = ()) -> None:
        """Write the masters into the working parameters of all W ranks, but for those done; see `gather_weights`."""
        if self.num_shards > 1:
            left = [(param, master) for param, master in self.of.items() if param not in done]
            gather_weights(left, self.groups, max(bucket_size // self.num_shards, 1), defer=defer)
        for param, master in self.of.items():
            if self.num_shards == 1 and master.data_ptr() != param.data_ptr():
                param.data.copy_(master.view(param.shape))
            self.active_set.note(param, master)

    def make_master(self, param: Parameter) -> Tensor:
        """A master with the weight's values; the weight itself where a copy would be no different."""
        dtype = self.dtype(param)
        device = torch.device("cpu") if self._offload else param.device
        return self.weight_of(param).to(device, dtype, copy=self.num_shards > 1)

    def weight_of(self, param: Parameter) -> Tensor:
        """What the master stands for: this rank's part of the weight, or the weight itself."""
        # `data` is a plain tensor where ColossalAI has changed the parameter's class (overlap_allgather); everything
        # else of such a parameter is of a class whose in-place operations are not in place.
        weight = param.data
        return weight if not self.groups else self._part(weight.reshape(-1), self._length(param))

    def _length(self, param: Parameter) -> int:
        return math.prod(self.layout(param).local_shape)

    def _part(self, tensor: Tensor, length: int) -> Tensor:
        """[length] this rank's part of a flat tensor; zeros where it reaches beyond the end."""
        part = tensor[self.shard * length : (self.shard + 1) * length]
        return torch.nn.functional.pad(part, (0, length - part.numel())) if part.numel() < length else part


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
