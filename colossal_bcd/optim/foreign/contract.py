"""What can be relied on of an optimizer of another package: measured with twins that step small tensors.

Blocks and engines exchange the tensors in an optimizer's param groups, and ZeRO gives it parts of tensors.  An
optimizer bears that if all that it keeps is state by parameter.  Many keep more: state that the constructor makes,
counts in the param groups, state under other keys, numbers on the object.  That is found here by looking at a twin
before and after its steps, and set again where other tensors come; what still differs from a new optimizer is a reason
to refuse it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.foreign.trial import flat, members_of, new_tensors, on_some_device, remembered, run, twin_of
from colossal_bcd.optim.foreign.twin import (
    MISSING,
    TwinError,
    attributes,
    copied,
    equal,
    is_plain,
    is_record,
    new_twin,
    reseed,
    unnoticed,
)

logger = logging.getLogger(__name__)

STEPS = 3
"""Steps of a twin before and after its tensors are exchanged."""
PATIENCE = 12
"""Steps after which a twin that has moved nothing is taken for one that never will."""
KERNELS = {"FusedAdam": frozenset({"step"})}
"""Classes of ColossalAI and apex whose kernels may be missing where a twin steps, and the counts in their groups."""


class StaleError(TwinError):
    """An optimizer goes by tensors that it no longer has."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What an optimizer keeps besides state by parameter, and what it began with."""

    name: str
    counts: frozenset[str] = frozenset()
    """Keys of param groups that its step writes."""
    beginnings: tuple[dict[str, Any], ...] = ()
    """What the constructor gives each group under these keys; under those that are not there it gives nothing."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Attributes of the object that its step writes, as the constructor leaves them (`MISSING`: not at all)."""
    constructs_state: bool = False
    """Whether the constructor makes state."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Those of that state which are single numbers, by name."""
    shares_state: bool = False
    """Whether it keeps state under keys that are no parameters."""
    draws: bool = False
    """Whether its steps depend on random numbers."""
    misfit: str | None = None
    """Why it cannot be given other tensors; None: it can."""
    remedy: str = ""

    @property
    def by_parameter(self) -> bool:
        """Whether all it keeps is state by parameter."""
        return not (self.counts or self.attributes or self.shares_state)

    def require_exchangeable(self, subject: str) -> None:
        """Refuse an optimizer that cannot be given other tensors.

        Args:
            subject: what the optimizer was given to, for the message.
        Raises:
            ValueError: it cannot.
        """
        if self.misfit is not None:
            raise ValueError(
                f"{subject}: got {self.name}, which {self.misfit}; expected an optimizer that steps whatever is in its "
                f"param groups. {self.remedy}"
            )

    def is_new(self, optimizer: Optimizer) -> bool:
        """Whether the state of an optimizer is as its constructor makes it."""
        if not self.constructs_state:
            return not optimizer.state
        return all(
            equal(self.numbers.get(name, value), value)
            for key, state in optimizer.state.items()
            if isinstance(key, Tensor)
            for name, value in state.items()
        )

    def _constructed(self, optimizer: Optimizer) -> Optimizer:
        tensors = [group["params"] for group in optimizer.param_groups]
        with unnoticed(torch.device("cpu")):
            return new_twin(optimizer, tensors, self.counts.union(self.attributes))

    def begin(self, optimizer: Optimizer, survivors: Set[Tensor] = frozenset()) -> None:
        """Set again what the constructor sets, for the tensors that are in the param groups now.

        Args:
            optimizer: has its new tensors already.
            survivors: tensors that keep their state; a group that holds one keeps its counts.
        """
        for group, beginning in zip(optimizer.param_groups, self.beginnings, strict=False):
            if survivors.isdisjoint(group["params"]):
                _restore(group, self.counts, beginning)
        _restore(vars(optimizer), self.attributes.keys(), self.attributes)
        if self.constructs_state or self.shares_state:
            for stale in [key for key in optimizer.state if not (isinstance(key, Tensor) and key in survivors)]:
                del optimizer.state[stale]
            for key, state in self._constructed(optimizer).state.items():
                if not (isinstance(key, Tensor) and key in survivors):
                    optimizer.state[key] = state


def _restore(target: dict[str, Any], keys: Set[str], beginning: dict[str, Any]) -> None:
    for key in keys:
        value = beginning.get(key, MISSING)
        if value is MISSING:
            target.pop(key, None)
        else:
            target[key] = copied(value)


def examine(optimizer: Optimizer) -> Contract:
    """What an optimizer keeps where, and whether it bears other tensors.

    It is judged by twins with the same hyper-parameters over a small tensor for each param group and number of dims;
    the optimizer itself, random numbers and hooks stay as they are.  Optimizers of this package need no judgement.
    """
    name = _name(optimizer)
    if isinstance(optimizer, ShardedOptimizer):
        return Contract(name=name)
    inner = _inner_optimizer(optimizer)
    if inner is not None:
        where, other = inner
        reason = f"holds another optimizer, a {type(other).__name__} in its attribute {where!r}, with groups of its own"
        return Contract(name=name, misfit=reason, remedy=f"Take that {type(other).__name__} itself.")
    if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        return Contract(
            name=name,
            misfit="has the model compute with other weights while it trains than afterwards, and exchanges them in "
            "train() and eval(), which nobody calls for tensors that leave",
            remedy="Take one that is not schedule-free, such as torch.optim.AdamW, and a learning-rate scheduler.",
        )
    return remembered(optimizer, "contract", lambda: _measured(optimizer))


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__.partition('.')[0]}'s {type(optimizer).__qualname__}"


def _inner_optimizer(optimizer: Optimizer) -> tuple[str, Optimizer] | None:
    """An attribute that is, or holds, an optimizer other than this one."""
    for name, value in attributes(optimizer).items():
        within = {name: value}
        if is_record(value):
            within.update({f"{name}.{key}": each for key, each in vars(value).items()})
        for where, held in within.items():
            listed = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else [held]
            for each in listed:
                if isinstance(each, Optimizer) and each is not optimizer:
                    return where, each
    return None


def _measured(optimizer: Optimizer) -> Contract:
    name = _name(optimizer)
    try:
        contract: Contract = on_some_device(optimizer, _measure)
    except TwinError as error:
        counts = KERNELS.get(type(optimizer).__qualname__)
        if counts is not None and any(param.device.type != "cpu" for param in flat(members_of(optimizer))):
            logger.warning("%s could not be tried (%s); it is taken as known: it counts in %s", name, error, *counts)
            groups = ({key: group[key] for key in counts if key in group} for group in optimizer.param_groups)
            return Contract(name=name, counts=counts, beginnings=tuple(groups))
        return Contract(
            name=name,
            misfit=str(error),
            remedy="Take an optimizer whose step() reads the gradients of its param groups, such as torch.optim.AdamW.",
        )
    return contract


def _measure(optimizer: Optimizer, device: torch.device) -> Contract:
    try:
        return _observed(optimizer, device, flags=False)
    except StaleError:
        return _observed(optimizer, device, flags=True)


def _observed(optimizer: Optimizer, device: torch.device, *, flags: bool) -> Contract:
    """Compare a twin before its steps, after them, and with other tensors.

    Args:
        optimizer: the one to be judged.
        device: of the twin's tensors.
        flags: set attributes again, too, that are True or False, which say mostly that something has been made.
    """
    old = new_tensors(optimizer, device, 1)
    twin = twin_of(optimizer, old)
    groups, own = [copied(dict(group, params=None)) for group in twin.param_groups], copied(attributes(twin))
    constructs_state, stepped = bool(twin.state), bool(optimizer.state)
    numbers = {
        name: copied(value)
        for key, state in twin.state.items()
        if isinstance(key, Tensor)
        for name, value in state.items()
        if (value.dim() == 0 if isinstance(value, Tensor) else is_plain(value))
    }
    weights = [tensor.detach().clone() for tensor in flat(old)]
    steps = STEPS
    run(twin, old, STEPS, 2)
    while all(map(equal, weights, (tensor.detach() for tensor in flat(old)))):
        steps += STEPS
        if steps > PATIENCE:
            raise TwinError("has moved none of the tensors in its param groups by their gradients")
        run(twin, old, STEPS, steps)
    counts = frozenset(
        key
        for before, after in zip(groups, twin.param_groups, strict=True)
        for key in {**before, **after}
        if key != "params" and not equal(before.get(key, MISSING), after.get(key, MISSING))
    )
    if "lr" in counts:
        raise TwinError("writes the learning rates of its param groups, which belong to their user and to schedulers")
    now = attributes(twin)
    written = {name for name in {**own, **now} if not equal(own.get(name, MISSING), now.get(name, MISSING))}
    if not flags:
        written = {name for name in written if not isinstance(now.get(name), bool)}
    if stepped:
        other = twin_of(optimizer, new_tensors(optimizer, device, 3), counts.union(written))
        groups, own = other.param_groups, attributes(other)
    contract = Contract(
        name=_name(optimizer),
        counts=counts,
        beginnings=tuple({key: copied(group[key]) for key in counts if key in group} for group in groups),
        attributes={name: copied(own.get(name, MISSING)) for name in sorted(written)},
        constructs_state=constructs_state,
        numbers=numbers,
        shares_state=any(not isinstance(key, Tensor) for key in twin.state),
    )
    _require_exchange(optimizer, device, twin, contract, steps)
    return dataclasses.replace(contract, draws=_draws(optimizer, device, steps))


def _require_exchange(
    optimizer: Optimizer, device: torch.device, twin: Optimizer, contract: Contract, steps: int
) -> None:
    """Give the twin other tensors, and compare what it does with them with what a new one does."""
    left = [(tensor, tensor.detach().clone()) for tensor in flat(members_of(twin))]
    got, want = new_tensors(optimizer, device, 4), new_tensors(optimizer, device, 4)
    twin.state.clear()
    for group, members in zip(twin.param_groups, got, strict=True):
        group["params"] = list(members)
    contract.begin(twin)
    new = twin_of(optimizer, want, contract.counts.union(contract.attributes) if optimizer.state else frozenset())
    for each, tensors in ((twin, got), (new, want)):
        reseed(device)
        run(each, tensors, steps, 5)
    if not all(equal(tensor.detach(), before) for tensor, before in left):
        raise StaleError("goes on moving tensors that are no longer in its param groups")
    if not all(map(equal, (t.detach() for t in flat(got)), (t.detach() for t in flat(want)))):
        raise StaleError(
            "remembers more of the tensors it had before than can be found: with others in its param groups it steps "
            "otherwise than a new one"
        )


def _draws(optimizer: Optimizer, device: torch.device, steps: int) -> bool:
    """Whether steps differ that differ in nothing but the seed of random numbers."""
    results = []
    for seed in range(2):
        tensors = new_tensors(optimizer, device, 6)
        reseed(device, seed)
        run(twin_of(optimizer, tensors), tensors, steps, 7)
        results.append([tensor.detach() for tensor in flat(tensors)])
    return not equal(*results)
