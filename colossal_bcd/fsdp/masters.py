"""Masters of what trains: this rank's rows of each weight, which no other rank has and nobody gathers for a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.active_set import ActiveSet, follow
from colossal_bcd.engine.transport import says_there_is_one
from colossal_bcd.optim.state.rounding import LOW_PRECISION
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.dtensor import local_values


class RowMasters:
    """Makes masters of sharded parameters: flat, float32 for bfloat16 and float16 weights, else the rows themselves.

    Args:
        active_set: has the masters.
        layouts: of every parameter that may ever be trained.
    """

    def __init__(self, active_set: ActiveSet, layouts: Mapping[Parameter, Layout]) -> None:
        self.active_set, self._layouts = active_set, layouts

    @property
    def of(self) -> dict[Parameter, Tensor]:
        """Master by sharded parameter."""
        return self.active_set.masters

    def layout(self, param: Parameter) -> Layout:
        """Layout of the parameter and of its master."""
        return self._layouts[param]

    def dtype(self, param: Parameter) -> torch.dtype:
        """Dtype of the parameter's master."""
        return torch.float32 if param.dtype in LOW_PRECISION else param.dtype

    def make_master(self, param: Parameter) -> Tensor:
        """See `MasterMaker`: like `weight_of`, whose memory it shares unless the weight has a lower precision."""
        weight = self.weight_of(param)
        if param.dtype != self.dtype(param):
            return weight.to(self.dtype(param))
        # A view would keep the rows alive that FSDP2 replaces by padded ones at the first forward pass.
        return weight.new_empty(0).set_(weight)  # type: ignore[call-overload]

    def weight_of(self, param: Parameter) -> Tensor:
        """See `MasterMaker`: [num_local] of a slice, else in the shape of the shard."""
        return self._shaped(param, local_values(param))

    def _shaped(self, param: Parameter, values: Tensor) -> Tensor:
        return values if self._layouts[param].slice is None else values.reshape(-1)

    def follow(self, param: Parameter, master: Tensor) -> None:
        """See `MasterMaker`; a master that shares the weight's memory moves with it."""
        weight = self.weight_of(param)
        if master.dtype != weight.dtype:
            follow(master, weight)
        elif master.data_ptr() != weight.data_ptr():
            master.data = weight

    @torch.no_grad()
    def load_gradient(self, param: Parameter, master: Tensor) -> None:
        """Move this rank's rows of the averaged gradient to the master, in its dtype."""
        grad, param.grad = param.grad, None
        master.grad = None if grad is None else self._shaped(param, local_values(grad)).to(master.dtype)

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the masters into the rows, and drop the gradients, but for the sign that there was one."""
        for param, master in self.of.items():
            if master.dtype != param.dtype:
                self.weight_of(param).copy_(master)
            self.active_set.note(param, master)
            if master.grad is not None:
                master.grad = says_there_is_one(master)
