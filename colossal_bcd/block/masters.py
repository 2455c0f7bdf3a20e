"""Masters of whole parameters on one process."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.active_set import ActiveSet, follow
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import follow_weights
from colossal_bcd.optim.state.rounding import LOW_PRECISION
from colossal_bcd.sharding import Layout, Mesh
from colossal_bcd.sharding.dtensor import is_dtensor

logger = logging.getLogger(__name__)


class LocalMasters:
    """Makes masters of whole parameters, and moves gradients to them and weights back.

    bfloat16 and float16 parameters get a float32 clone; every other one is its own master, without a copy.  Gradients
    are consumed by a step: both kinds have none after it.

    Args:
        names: name of each parameter, for errors.
    """

    def __init__(self, names: Mapping[Parameter, str]) -> None:
        self._names = names
        self._used_up = self._said_used_up = False

    def make_master(self, param: Parameter) -> Tensor:
        """See `MasterMaker`; there is none of a DTensor, on which no step is taken."""
        if param.dtype not in LOW_PRECISION or is_dtensor(param):
            return param
        return param.detach().to(torch.float32).requires_grad_()

    def weight_of(self, param: Parameter) -> Tensor:
        """See `MasterMaker`."""
        return param

    def follow(self, param: Parameter, master: Tensor) -> None:
        """See `MasterMaker`."""
        follow(master, param)

    def bind(self, base: Optimizer, active: ActiveSet, keys: Mapping[int, int]) -> None:
        """Tell the base optimizer that its tensors are whole parameters.

        Args:
            base: has the masters.
            active: the masters by parameter.
            keys: number of each parameter, by id.
        """
        if any(map(is_dtensor, active.masters)):
            return
        if isinstance(base, ShardedOptimizer):
            whole = {master: Layout.whole(tuple(master.shape)) for master in active.masters.values()}
            base.bind(whole, Mesh(), {master: keys[id(param)] for param, master in active.masters.items()})
        else:
            follow_weights(base, active.masters)

    @torch.no_grad()
    def load_gradients(self, active: ActiveSet) -> None:
        """Give every master the gradient of its parameter in its own dtype, None where that has none.

        Raises:
            ValueError: a gradient is sparse, or the model was moved or converted since its parameters became active.
        """
        for param, master in active.masters.items():
            self._check(param, master)
        if self._used_up and not self._said_used_up:
            self._said_used_up = True
            logger.info(
                "a step follows another one without zero_grad() of the BlockOptimizer between them: a step uses "
                "gradients up, they do not accumulate over steps"
            )
        active.follow()
        for param, master in active.masters.items():
            if master is not param and param.grad is not None:
                master.grad = param.grad.to(master.dtype)
                param.grad = None

    @torch.no_grad()
    def write_back(self, active: ActiveSet) -> None:
        """Bring the updated masters into the model, and drop the gradients."""
        self._used_up = True
        for param, master in active.masters.items():
            if master is not param:
                param.copy_(master)
                active.note(param, master)
            master.grad = None

    def zero_grad(self, active: ActiveSet, set_to_none: bool) -> None:
        """Drop the gradients of active parameters and of their masters, or make them zero."""
        self._used_up = False
        for param, master in active.masters.items():
            if master is not param:
                master.grad = None
            if param.grad is not None:
                param.grad = None if set_to_none else torch.zeros_like(param.grad)

    def _check(self, param: Parameter, master: Tensor) -> None:
        name = self._names[param]
        if is_dtensor(param):
            raise ValueError(
                f"parameter {name!r} is a DTensor of which this process has a part, expected an engine "
                "that steps on parts. Call colossal_bcd.fsdp.attach(model, optimizer) before the first step."
            )
        if param.device != master.device or (master is param) != (param.dtype not in LOW_PRECISION):
            raise ValueError(
                f"parameter {self._names[param]!r} is now {param.dtype} on {param.device}, its master is "
                f"{master.dtype} on {master.device}: the model was moved or converted after the optimizer was made. "
                "Make the base optimizer and the BlockOptimizer after model.to(...)."
            )
        if param.grad is not None and param.grad.layout != torch.strided:
            raise ValueError(
                f"parameter {self._names[param]!r} has a sparse gradient, expected a dense one. Build its embedding "
                "with sparse=False, or leave it out of the blocks."
            )
