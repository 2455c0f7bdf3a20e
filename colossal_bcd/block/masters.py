"""The weights that the base optimizer updates, apart from the weights that the model computes with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.importance import squared_norms
from colossal_bcd.block.residual import ResidualOptions, Residuals
from colossal_bcd.block.written import WriteMarks, follow

logger = logging.getLogger(__name__)
LOW_PRECISION = (torch.float16, torch.bfloat16)


class Masters(Protocol):
    """Who holds the masters of the active parameters."""

    def activate(self, groups: Sequence[Sequence[Parameter]], keep: Set[Parameter]) -> list[list[Tensor]]:
        """Take over the parameters that are active from now on.

        Args:
            groups: active parameters of each param group, which may have none.
            keep: parameters whose masters survive if they have one; all others are freed and made anew.
        Returns:
            What the base optimizer must hold: one tensor for each parameter, in the same order.
        """

    def bind(self) -> None:
        """Note that the base optimizer's groups hold what `activate` returned; for engines."""

    def load_gradients(self) -> None:
        """Give every master the gradient of its parameter, None where that has none."""

    def write_back(self) -> None:
        """Bring the updated masters into the model, and drop the gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of active parameters and of their masters, or make them zero."""

    def squared_weights(self, blocks: Sequence[Sequence[Parameter]]) -> Tensor:
        """[number of blocks] float64 squared norms of the weights in the model, over all ranks; for "importance"."""


class LocalMasters:
    """Masters of whole parameters on one process.

    bfloat16 and float16 parameters get a float32 clone; every other one is its own master, without a copy.  Gradients
    are consumed by a step: both kinds have none after it.

    Args:
        names: name of each parameter, for errors.
        residual: how to remember what rounding cuts off a master that goes, for the next one; None: forget it.

    Attributes:
        aside: masters of kept parameters that are not active.
        residuals: of parameters that are not active.
    """

    def __init__(self, names: Mapping[Parameter, str], *, residual: ResidualOptions | None = None) -> None:
        self._names = names
        self.tensors: dict[Parameter, Tensor] = {}
        """Master of every active parameter; the parameter itself where it is its own."""
        self._marks = WriteMarks()
        self._used_up = self._said_used_up = False
        self.aside: dict[Parameter, Tensor] = {}
        self.residuals = Residuals(residual)

    def activate(self, groups: Sequence[Sequence[Parameter]], keep: Set[Parameter]) -> list[list[Tensor]]:
        active = {param for group in groups for param in group}
        for param in [param for param in self.tensors if param not in keep]:
            self.residuals.keep(param, self.tensors.pop(param), param)
        held = {**self.aside, **self.tensors}
        self.tensors = {param: master for param, master in held.items() if param in keep}
        self.aside = {param: master for param, master in self.tensors.items() if param not in active}
        survivors = set(self.tensors)
        del held
        self.tensors = {param: self._master(param) for group in groups for param in group}
        self._marks.renew(self.tensors, survivors)
        return [[self.tensors[param] for param in group] for group in groups]

    def put_aside(self, masters: dict[Parameter, Tensor]) -> None:
        """Hold masters, as of a saved run, for parameters that are not active."""
        self.aside = masters
        for param, master in masters.items():
            self._marks.note(param, master, loaded=True)

    def bind(self) -> None:
        """Nothing: whole parameters need no layout."""

    @torch.no_grad()
    def load_gradients(self) -> None:
        """Give every master its gradient in its own dtype.

        Raises:
            ValueError: a gradient is sparse, or the model was moved or converted since its parameters became active.
        """
        for param, master in self.tensors.items():
            self._check(param, master)
        if self._used_up and not self._said_used_up:
            self._said_used_up = True
            logger.info(
                "a step follows another one without zero_grad() of the BlockOptimizer between them: a step uses "
                "gradients up, they do not accumulate over steps"
            )
        self.follow()
        for param, master in self.tensors.items():
            if master is not param and param.grad is not None:
                master.grad = param.grad.to(master.dtype)
                param.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        self._used_up = True
        for param, master in self.tensors.items():
            if master is not param:
                param.copy_(master)
                self._marks.note(param, master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._used_up = False
        for param, master in self.tensors.items():
            if master is not param:
                master.grad = None
            if param.grad is not None and set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad = torch.zeros_like(param.grad)

    @torch.no_grad()
    def squared_weights(self, blocks: Sequence[Sequence[Parameter]]) -> Tensor:
        return squared_norms([[param.reshape(-1) for param in params] for params in blocks])

    def _master(self, param: Parameter) -> Tensor:
        if param in self.tensors:
            return self.tensors[param]
        if param.dtype not in LOW_PRECISION:
            return param
        master = param.detach().to(torch.float32)
        self.residuals.give_back(param, master)
        return master.requires_grad_()

    def follow(self) -> None:
        """Take over weights that were written into the model from outside, such as by `model.load_state_dict`."""
        for param, master in [*self.tensors.items(), *self.aside.items()]:
            if master is not param and not self._marks.master_goes_first(param, master):
                follow(master, param)
                self._marks.note(param, master)

    def _check(self, param: Parameter, master: Tensor) -> None:
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
