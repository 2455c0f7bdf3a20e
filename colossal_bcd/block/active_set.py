"""What the base optimizer holds: masters of the active parameters, their state, and the state that waits."""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.exact_state import undo_casts
from colossal_bcd.block.masters import Masters
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.contract import Contract
from colossal_bcd.sharding import Layout, Mesh


class ActiveSet:
    """The base optimizer's tensors by parameter, and the state of parameters that are kept while they do not train."""

    def __init__(self) -> None:
        self.tensors: dict[Parameter, Tensor] = {}
        """What the base optimizer holds for each active parameter."""
        self.aside: dict[Parameter, Any] = {}
        """State of kept parameters that are not active now."""
        self.contract = Contract(name="the base optimizer")
        """What the base optimizer keeps besides."""

    def has_stepped(self, base: Optimizer) -> bool:
        """Whether the base optimizer has state that its constructor has not made."""
        return bool(base.state) and not self.contract.is_new(base)

    def replace(
        self, base: Optimizer, masters: Masters, groups: Sequence[Sequence[Parameter]], keep: Set[Parameter]
    ) -> None:
        """Hand the masters of other parameters to the base optimizer; what is not kept is freed first.

        Args:
            base: holds the old tensors and gets the new ones.
            masters: makes them.
            groups: active parameters of each param group.
            keep: parameters whose masters and state survive, whether they are active now or not.
        """
        if not isinstance(base.state, dict):  # overwritten from outside, which torch mends in load_state_dict
            base.state = collections.defaultdict(dict)
        active = {param for params in groups for param in params}
        stay = {tensor for param, tensor in self.tensors.items() if param in keep and param in active}
        self.aside = {param: state for param, state in self.aside.items() if param in keep}
        for param, tensor in self.tensors.items():
            if param in keep and param not in active and tensor in base.state:
                self.aside[param] = base.state[tensor]
        self.tensors = {}
        for group in base.param_groups:
            group["params"] = NothingActive()
        for tensor in [tensor for tensor in base.state if tensor not in stay]:
            del base.state[tensor]
        if isinstance(base, ShardedOptimizer):
            base.unbind()
        for group, params, tensors in zip(base.param_groups, groups, masters.activate(groups, keep), strict=True):
            self.tensors.update(zip(params, tensors, strict=True))
            group["params"] = list(tensors) or NothingActive()
        self.contract.begin(base, stay)
        for param in active.intersection(self.aside):
            base.state[self.tensors[param]] = self.aside.pop(param)

    def bind_whole(self, base: ShardedOptimizer, members: Sequence[Sequence[Parameter]]) -> None:
        """Tell an optimizer of this package that its tensors are whole parameters.

        Args:
            base: the base optimizer.
            members: parameters of each group as they were given, whose places are their numbers.
        """
        whole = {tensor: Layout.whole(tuple(tensor.shape)) for tensor in self.tensors.values()}
        places = {param: key for key, param in enumerate(param for group in members for param in group)}
        base.bind(whole, Mesh(), {tensor: places[param] for param, tensor in self.tensors.items()})


class NothingActive(list[Any]):
    """The parameters of a group of which nothing is active: none.

    Schedulers that look for the gradient of each group's first parameter, like transformers' AdafactorSchedule, find
    one without values and without a gradient.
    """

    def __getitem__(self, index: Any) -> Any:
        if not len(self) and index == 0 and not isinstance(index, slice):
            return torch.empty(0)
        return super().__getitem__(index)


def load_state(base: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a base optimizer's own state dict, keeping the group dicts that schedulers hold."""
    groups, state = base.param_groups, base.state
    base.load_state_dict(copy.deepcopy(state_dict))
    for group, loaded in zip(groups, base.param_groups, strict=True):
        group.update(loaded)
    state.clear()
    state.update(base.state)
    base.param_groups, base.state = groups, state
    if not isinstance(base, ShardedOptimizer):
        undo_casts(base, state_dict)


def warm_up(num_steps: int, period: int, num_warm: int) -> float:
    """Factor of the learning rate in the step that follows `num_steps` applied ones.

    The first `num_warm` steps of a run have factor 1; after every switch the factor grows linearly to 1 over as many.
    """
    return 1.0 if num_steps < num_warm else min(1.0, (num_steps % period + 1) / max(num_warm, 1))


@contextlib.contextmanager
def scaled_rates(groups: Sequence[dict[str, Any]], factor: float) -> Iterator[None]:
    """Param groups with learning rates times `factor`; schedulers see the old ones afterwards."""
    if factor == 1:
        yield
        return
    rates = [group["lr"] for group in groups]
    try:
        for group in groups:
            group["lr"] = group["lr"] * factor
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
