"""Master weights of what is trained, sharded over ZeRO ranks.  W: ranks that share them (1: not sharded)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.residual import ResidualOptions, Residuals
from colossal_bcd.block.written import WriteMarks, follow
from colossal_bcd.engine.gather import Defer, gather_weights
from colossal_bcd.sharding import Layout, wide


class ShardedMasters:
    """This rank's part of every trained weight, in the precision in which it is updated.

    Args:
        layouts: tensor-parallel layout of every parameter that may ever be trained here.
        groups: the process groups whose product is the W ranks; empty for none.
        low_precision: masters have the weights' own dtype instead of float32.
        offload: masters live on the CPU.
        whole_rows: see `slice_length`.
        chunk: see `slice_length`.
        residual: how to remember what rounding cuts off a master that goes, for the next one; None: forget it.

    Attributes:
        of: working parameter -> master; a flat part [slice_length], or the shard in its shape if there are no groups.
    """

    def __init__(
        self,
        layouts: Mapping[Parameter, Layout],
        groups: Sequence[dist.ProcessGroup],
        *,
        low_precision: bool = False,
        offload: bool = False,
        whole_rows: bool = False,
        chunk: int = 1,
        residual: ResidualOptions | None = None,
    ) -> None:
        self._layouts, self.groups, self.whole_rows = layouts, tuple(groups), whole_rows
        self.chunk = chunk
        self._low_precision, self._offload = low_precision, offload
        self.of: dict[Parameter, Tensor] = {}
        self.aside: dict[Parameter, Tensor] = {}
        """Masters of kept parameters that are not active."""
        self.residuals = Residuals(residual)
        """Of parameters that are not active."""
        self._marks = WriteMarks()
        self.num_shards = math.prod(dist.get_world_size(group) for group in groups)
        self.shard = 0
        for group in groups:  # of several groups, the last one counts fastest
            self.shard = self.shard * dist.get_world_size(group) + dist.get_rank(group)

    def layout(self, param: Parameter) -> Layout:
        """Layout of the parameter's master."""
        layout = self._layouts[param]
        if not self.groups:
            return layout
        return layout.sliced("zero", self.shard, self.num_shards, whole_rows=self.whole_rows, chunk=self.chunk)

    @torch.no_grad()
    def activate(self, params: Sequence[Parameter], keep: Collection[Parameter]) -> None:
        """Hold masters of exactly these parameters; the old ones are freed first, except those of `keep`."""
        survivors, active = set(keep), set(params)
        for param in [param for param in self.of if param not in survivors]:
            self.residuals.keep(param, self.of.pop(param), self.weight(param))
        held = {**self.aside, **self.of}
        held = {param: master for param, master in held.items() if param in survivors}
        self.aside = {param: master for param, master in held.items() if param not in active}
        self.of = {param: held[param] for param in params if param in held}
        remaining = {*self.of, *self.aside}
        del held
        self.of = {param: self.of[param] if param in self.of else self._restored(param) for param in params}
        self._marks.renew(self.of, remaining)

    def dtype(self, param: Parameter) -> torch.dtype:
        """Dtype of the parameter's master."""
        return param.dtype if self._low_precision else wide(param.dtype)

    @torch.no_grad()
    def refresh(self, params: Iterable[Parameter] | None = None) -> None:
        """Take the values of these working parameters again, where they are not the rounded masters; None: of all."""
        for param in self.of if params is None else params:
            self._follow(param, self.of[param])

    @torch.no_grad()
    def follow(self) -> None:
        """Take over weights that were written from outside since the last step; every rank looks at its own part.

        Raises:
            ValueError: a weight has another shape now.
        """
        for param, master in [*self.of.items(), *self.aside.items()]:
            if not self._marks.master_goes_first(param, master):
                self._follow(param, master)

    def _follow(self, param: Parameter, master: Tensor) -> None:
        if master.data_ptr() == param.data_ptr():
            return
        if tuple(param.shape) != self._layouts[param].local_shape:
            raise ValueError(
                f"a weight of shape {self._layouts[param].local_shape} now has shape {tuple(param.shape)}, expected "
                "the same. Change a model's shapes before it is boosted."
            )
        weight = self.weight(param)
        alone = self.num_shards == 1 and not self._offload
        if alone and weight.dtype == master.dtype and weight.data_ptr() == param.data_ptr():
            # The weight is its own master; `param.data = other` has given it another memory.
            master.data = weight
        else:
            follow(master, weight.view(master.shape))
        self._marks.note(param, master)

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
            self._marks.note(param, master)

    def _restored(self, param: Parameter) -> Tensor:
        master = self._new(param)
        self.residuals.give_back(param, master)
        return master

    def _new(self, param: Parameter) -> Tensor:
        """The weight itself where a master would be no different."""
        dtype = self.dtype(param)
        device = torch.device("cpu") if self._offload else param.device
        return self.weight(param).to(device, dtype, copy=self.num_shards > 1)

    def weight(self, param: Parameter) -> Tensor:
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
