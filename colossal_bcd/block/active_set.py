"""What trains now: masters and state of the active parameters, and what waits aside for its next turn.

    model          active set                                  base optimizer
    weight  ---->  master: a wider copy, or the weight itself  param_groups: masters of what is active
                   aside: masters and state of what is kept    state: by these masters
                   and does not train now
                   residuals: what rounding cuts off masters
                   that are freed

Who makes a master is not decided here: whole ones are made on one process (block/masters.py), this rank's region of
each under an engine (engine/masters.py).
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.residual import ResidualOptions, Residuals
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.contract import Contract
from colossal_bcd.sharding.dtensor import local_values

CHUNKS = {"cpu": 2**18}
"""Values that are compared at once, so that temporaries do not grow with the parameter, and fit a core's cache."""
CHUNK = 2**22
"""The same on other devices."""


class MasterMaker(Protocol):
    """Who makes the masters of an active set."""

    def make_master(self, param: Parameter) -> Tensor:
        """A master with the weight's values; the weight itself where a copy would be no different."""

    def weight_of(self, param: Parameter) -> Tensor:
        """The values of the weight that its master stands for, in the weight's dtype."""

    def follow(self, param: Parameter, master: Tensor) -> None:
        """Let a master have the weight's values, where that is not the rounded master."""


class ActiveSet:
    """Decides what survives when other parameters become active, on one process and under every engine.

    Args:
        residual: how to remember what rounding cuts off a master that is freed, for the next one; None: forget it.
    """

    _maker: MasterMaker

    def __init__(self, residual: ResidualOptions | None = None) -> None:
        self.masters: dict[Parameter, Tensor] = {}
        """Master of every active parameter; the parameter itself where it is its own."""
        self.aside: dict[Parameter, Tensor] = {}
        """Masters of kept parameters that are not active."""
        self.states_aside: dict[Parameter, Any] = {}
        """State of kept parameters that are not active."""
        self.residuals = Residuals(residual)
        """What rounding has cut off the masters of parameters that are not active."""
        self.contract = Contract(name="the base optimizer")
        """What the base optimizer keeps besides state by parameter."""
        self._residual = residual
        self._marks: dict[Parameter, tuple[int, int, int]] = {}

    def begin_anew(self, maker: MasterMaker) -> None:
        """Forget all masters, and let `maker` make those to come."""
        self._maker, self.residuals = maker, Residuals(self._residual)
        self.masters, self.aside, self.states_aside, self._marks = {}, {}, {}, {}

    def has_stepped(self, base: Optimizer) -> bool:
        """Whether the base optimizer has state that its constructor has not made."""
        return bool(base.state) and not self.contract.is_new(base)

    def activate(self, base: Optimizer, groups: Sequence[Sequence[Parameter]], keep: Set[Parameter]) -> None:
        """Hand the masters of other parameters to the base optimizer; what is not kept is freed first.

        Args:
            base: has the old masters, and gets the new ones.
            groups: active parameters of each param group, which may have none.
            keep: parameters whose masters and state survive, whether they are active now or not.
        """
        if not isinstance(base.state, dict):  # overwritten from outside, which torch mends in load_state_dict
            base.state = collections.defaultdict(dict)
        active = {param for params in groups for param in params}
        stay = {master for param, master in self.masters.items() if param in keep and param in active}
        self.states_aside = {param: state for param, state in self.states_aside.items() if param in keep}
        for param, master in self.masters.items():
            if param in keep and param not in active and master in base.state:
                self.states_aside[param] = base.state[master]
        for group in base.param_groups:
            group["params"] = NothingActive()
        for master in [master for master in base.state if master not in stay]:
            del base.state[master]
        if isinstance(base, ShardedOptimizer):
            base.unbind()
        self.exchange([param for params in groups for param in params], keep)
        for group, params in zip(base.param_groups, groups, strict=True):
            group["params"] = [self.masters[param] for param in params] or NothingActive()
        self.contract.begin(base, stay)
        for param in active.intersection(self.states_aside):
            base.state[self.masters[param]] = self.states_aside.pop(param)

    @torch.no_grad()
    def exchange(self, params: Sequence[Parameter], keep: Set[Parameter]) -> None:
        """Have masters of exactly these parameters; old ones are freed first, those of `keep` survive, maybe aside."""
        active = set(params)
        for param in [param for param in self.masters if param not in keep]:
            self.residuals.keep(param, self.masters.pop(param), self._maker.weight_of(param))
        survivors = {param: master for param, master in {**self.aside, **self.masters}.items() if param in keep}
        self.aside = {param: master for param, master in survivors.items() if param not in active}
        self.masters = {}  # so that nothing but the survivors is alive while new ones are made
        self.masters = {param: survivors[param] if param in survivors else self._new(param) for param in params}
        # Survivors keep their marks, so that writes in the meantime are noticed.
        self._marks = {param: mark for param, mark in self._marks.items() if param in survivors}
        for param, master in self.masters.items():
            if param not in self._marks:
                self.note(param, master)

    @torch.no_grad()
    def wait(self, params: Iterable[Parameter]) -> None:
        """Have new masters of these parameters aside, to be loaded, and of no others."""
        self.put_aside({param: self._new(param) for param in params})

    def put_aside(self, masters: dict[Parameter, Tensor]) -> None:
        """Have these masters aside; they go before their weights until these are written."""
        self.aside = masters
        for param in masters:
            self._marks[param] = *_written(param), -1

    def note(self, param: Parameter, master: Tensor) -> None:
        """Remember that weight and master agree."""
        self._marks[param] = *_written(param), master._version

    @torch.no_grad()
    def follow(self, params: Iterable[Parameter] | None = None) -> None:
        """Let masters follow weights that were written from outside, as by `model.load_state_dict` or an EMA swap.

        Masters that were written themselves since, as by loading a checkpoint, go before their weights.

        Args:
            params: active parameters whose weights go before their masters in any case; None: look at all.
        """
        if params is not None:
            for param in params:
                self._maker.follow(param, self.masters[param])
                self.note(param, self.masters[param])
            return
        for param, master in [*self.masters.items(), *self.aside.items()]:
            version, address, of_master = self._marks[param]
            master_alone = of_master != master._version and (version, address) == _written(param)
            if master is not param and not master_alone:
                self._maker.follow(param, master)
                self.note(param, master)

    def _new(self, param: Parameter) -> Tensor:
        master = self._maker.make_master(param)
        if master is not param:
            self.residuals.give_back(param, master)
        return master

    def state_dict(self, named: Mapping[str, Parameter]) -> dict[str, Any]:
        """Masters of what trains, and what waits for its turn, by name; nothing is copied.

        Args:
            named: all parameters, by name.
        """
        self.follow()
        pairs, masters, aside = named.items(), self.masters, self.aside
        waiting = {
            "aside_masters": {name: aside[p].detach() for name, p in pairs if aside.get(p, p) is not p},
            "aside_states": {name: dict(self.states_aside[p]) for name, p in pairs if p in self.states_aside},
            "residuals": {name: self.residuals.of[p] for name, p in pairs if p in self.residuals.of},
        }
        return {
            "masters": {name: masters[p].detach() for name, p in pairs if masters.get(p, p) is not p},
            **{key: of for key, of in waiting.items() if of},
        }

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any], named: Mapping[str, Parameter]) -> None:
        """Take over what `state_dict` returned, once what was active then is active."""
        for name, master in saved["masters"].items():
            self.masters[named[name]].copy_(master)
        self.residuals.of = {
            named[name]: self.residuals.empty(named[name], tuple(value.shape)).copy_(value)
            for name, value in saved.get("residuals", {}).items()
        }
        self.states_aside = {named[name]: copy.deepcopy(s) for name, s in saved.get("aside_states", {}).items()}
        aside = {named[name]: m.clone().requires_grad_() for name, m in saved.get("aside_masters", {}).items()}
        self.put_aside({param: aside.get(param, param) for param in {**self.states_aside, **aside}})


class NothingActive(list[Any]):
    """The parameters of a group of which nothing is active: none.

    Schedulers that look for the gradient of each group's first parameter, like transformers' AdafactorSchedule, find
    one without values and without a gradient.
    """

    def __getitem__(self, index: Any) -> Any:
        if not len(self) and index == 0 and not isinstance(index, slice):
            return torch.empty(0)
        return super().__getitem__(index)


def _written(param: Parameter) -> tuple[int, int]:
    """How often the values of a parameter on this rank were written, and where they are."""
    values = local_values(param)
    return values._version, values.data_ptr()


def follow(master: Tensor, weight: Tensor) -> None:
    """Take over the weight's values, in place; where the weight is the rounded master, that keeps what rounding lost.

    Values are compared, because a write through `param.data` leaves no trace: torch counts writes per tensor, and
    `data` is another tensor each time.  Gradients must not be recorded.

    Args:
        master: float32 or wider, or of the weight's dtype.
        weight: of the same shape, on any device.
    """
    if master.dtype == weight.dtype:
        master.copy_(weight)
        return
    chunk = CHUNKS.get(master.device.type, CHUNK)
    if master.numel() <= chunk or not master.is_contiguous():
        _follow(master, weight)
    else:
        values, written = master.view(-1), weight.reshape(-1)
        for start in range(0, len(values), chunk):
            _follow(values[start : start + chunk], written[start : start + chunk])


def _follow(master: Tensor, weight: Tensor) -> None:
    new = weight.to(master.device)
    rounded = master.to(new.dtype)
    # Mostly nothing was written, which a CPU finds out sooner; other devices would have to be waited for.
    if master.device.type == "cpu" and _same_bits(rounded, new):
        return
    torch.where(rounded == new, master, new.to(master.dtype), out=master)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; of large ones eight bytes are compared at a time, in half the time."""
    dense = one.dim() == 1 and one.is_contiguous() and other.is_contiguous()
    if dense and one.nbytes % 8 == 0 and (other.storage_offset() * other.itemsize) % 8 == 0:
        return torch.equal(one.view(torch.int64), other.view(torch.int64))
    return torch.equal(one, other)
