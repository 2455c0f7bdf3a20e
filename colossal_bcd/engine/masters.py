"""Master weights of what is trained, sharded over ZeRO ranks.  W: ranks that share them (1: not sharded)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.active_set import ActiveSet, follow
from colossal_bcd.engine.gather import Defer, gather_weights
from colossal_bcd.sharding import Layout, wide


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
