"""What can be relied on of an optimizer of another package: measured with twins that step small tensors.

Two questions are asked: what it keeps where, and whether an update of a value needs that value alone.

Blocks and engines exchange the tensors in an optimizer's param groups, and ZeRO gives it slices of tensors.  An
optimizer bears that if all that it keeps is state by parameter.  Many keep more: state that the constructor makes,
counts in the param groups, state under other keys, numbers on the object.  That is found here by looking at a twin
before and after its steps, and set again where other tensors come; what still differs from a new optimizer is a reason
to refuse it.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.foreign.twin import (
    MISSING,
    TwinError,
    attributes,
    copied,
    equal,
    flat,
    is_plain,
    is_record,
    members_of,
    new_tensors,
    new_twin,
    on_some_device,
    remembered,
    reseed,
    run,
    step_by_gradients,
    twin_of,
    unnoticed,
)

logger = logging.getLogger(__name__)

STEPS = 3
"""Steps of a twin before and after its tensors are exchanged."""
PATIENCE = 12
"""Steps after which a twin that has moved nothing is taken for one that never will."""
KERNELS = {"FusedAdam": frozenset({"step"})}
"""Classes of ColossalAI and apex whose kernels may be missing where a twin steps, and the counts in their groups."""
SCALES = (1.0, 8.0, 0.2, 1.0, 30.0, 1.0, 0.01, 1.0, 2.0, 1.0, 0.5, 1.0)
"""Scales of the gradients in the steps that tell whether an update is element-wise; repeated."""
ELEMENTWISE_STEPS = 36
CLOSE = 1e-5
"""Relative difference that rounding may make in this many steps in float32: 36 * 2**-24 is 2e-6."""


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
        """Refuse an optimizer that cannot be given other tensors; `subject` is what it was given to."""
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

        Survivors are tensors that keep their state; a group that holds one keeps its counts.
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
        for where, found in within.items():
            listed = (
                found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else [found]
            )
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

    With `flags` attributes that are True or False, which say mostly that something has been made, are set again, too.
    """
    old = new_tensors(optimizer, device, 1)
    twin = twin_of(optimizer, old)
    groups, before = [copied(dict(group, params=None)) for group in twin.param_groups], copied(attributes(twin))
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
        for old_group, group in zip(groups, twin.param_groups, strict=True)
        for key in {**old_group, **group}
        if key != "params" and not equal(old_group.get(key, MISSING), group.get(key, MISSING))
    )
    if "lr" in counts:
        raise TwinError("writes the learning rates of its param groups, which belong to their user and to schedulers")
    now = attributes(twin)
    written = {name for name in {**before, **now} if not equal(before.get(name, MISSING), now.get(name, MISSING))}
    if not flags:
        written = {name for name in written if not isinstance(now.get(name), bool)}
    if stepped:
        other = twin_of(optimizer, new_tensors(optimizer, device, 3), counts.union(written))
        groups, before = other.param_groups, attributes(other)
    contract = Contract(
        name=_name(optimizer),
        counts=counts,
        beginnings=tuple({key: copied(group[key]) for key in counts if key in group} for group in groups),
        attributes={name: copied(before.get(name, MISSING)) for name in sorted(written)},
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


def update_apart(optimizer: Optimizer) -> float:
    """Measure how much an update of a value depends on more than that value.

    Twins step whole tensors, others the halves of the same tensors.  The result is a share of the largest change of a
    tensor: 0 but for rounding for an element-wise update, infinite for NaN.

    Raises:
        TwinError: the optimizer cannot be imitated, or its step fails.
    """
    return remembered(optimizer, "elementwise", lambda: on_some_device(optimizer, _difference_of_halves))


def _difference_of_halves(optimizer: Optimizer, device: torch.device) -> float:
    whole = new_tensors(optimizer, device, 8)
    start = [tensor.detach().clone() for tensor in flat(whole)]
    halves = [[[_half(tensor, side) for tensor in members] for members in whole] for side in range(2)]
    twins = [twin_of(optimizer, tensors) for tensors in (whole, *halves)]
    generator = torch.Generator().manual_seed(9)
    for step in range(ELEMENTWISE_STEPS):
        for tensor, before, *both in zip(flat(whole), start, *map(flat, halves), strict=True):
            tensor.grad = _gradient(tensor.detach(), before, step, generator)
            gradients = tensor.grad.reshape(-1).tensor_split([both[0].numel()])
            for half, gradient in zip(both, gradients, strict=True):
                half.grad = gradient.clone()
        reseed(device)
        step_by_gradients(twins[0])
        for twin in twins[1:]:
            reseed(device)
            try:
                step_by_gradients(twin)
            except TwinError:  # that of whole tensors went well
                return math.inf
    worst = 0.0
    for tensor, before, *both in zip(flat(whole), start, *map(flat, halves), strict=True):
        moved = (tensor.detach() - before).abs().max()
        apart = (torch.cat([half.detach() for half in both]) - tensor.detach().reshape(-1)).abs().max()
        share = float(apart / moved) if moved > 0 else float(apart)
        worst = max(worst, share if math.isfinite(share) else math.inf)
    return worst if _knows_halves_alike(*twins) else max(worst, 1.0)


def _gradient(weight: Tensor, start: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Three kinds in turn, as updates have cases for each: noise, a slope that stays, and nearly orthogonal to rows."""
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
    if step % 3 == 1:
        noise = noise + 2 * start
    elif step % 3 == 2 and weight.dim() > 0:
        rows, noise = weight.reshape(len(weight), -1), noise.reshape(len(weight), -1)
        if weight.dim() == 1:
            rows, noise = rows.T, noise.T
        noise = noise - 0.99 * rows * (noise * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
        noise = (noise.T if weight.dim() == 1 else noise).reshape(weight.shape)
    return noise * SCALES[step % len(SCALES)]


def _knows_halves_alike(whole: Optimizer, *halves: Optimizer) -> bool:
    """Whether what the twins keep would be the same if they were one, as far as that has no effect on weights yet.

    A number that halves know otherwise than the whole does is made from many values, and so is a tensor that is neither
    such a number nor as large as its parameter.
    """
    of_halves = [_kept(half) for half in halves]
    for name, (value, size) in _kept(whole).items():
        for kept in of_halves:
            other, other_size = kept.get(name, (None, 0))
            if isinstance(value, Tensor) and size > 1 and value.numel() > 1 and value.numel() % size == 0:
                if not isinstance(other, Tensor) or other.numel() * size != value.numel() * other_size:
                    return False
            elif not _close(value, other):
                return False
    return True


def _close(left: Any, right: Any) -> bool:
    tensors = isinstance(left, Tensor) and isinstance(right, Tensor)
    if tensors and left.shape == right.shape and left.is_floating_point():
        return torch.allclose(left, right, rtol=CLOSE, atol=0, equal_nan=True)
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=CLOSE) or (left != left and right != right)
    return equal(left, right)


def _kept(twin: Optimizer) -> dict[tuple[Any, ...], tuple[Any, int]]:
    """Everything that a twin keeps, under names that twins of other tensors share, with the size of its parameter."""
    found: dict[tuple[Any, ...], tuple[Any, int]] = {}
    numbers = {param: number for number, param in enumerate(flat(members_of(twin)))}
    for index, group in enumerate(twin.param_groups):
        _collect(found, ("group", index), {key: value for key, value in group.items() if key != "params"}, 0)
    for key, value in twin.state.items():
        _collect(found, ("state", numbers.get(key, key)), value, key.numel() if isinstance(key, Tensor) else 0)
    return found


def _collect(found: dict[tuple[Any, ...], tuple[Any, int]], name: tuple[Any, ...], value: Any, size: int) -> None:
    if isinstance(value, (dict, list, tuple, collections.deque)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            _collect(found, (*name, key), each, size)
    elif is_plain(value) or isinstance(value, Tensor):
        found[name] = value, size
    elif is_record(value):
        _collect(found, name, vars(value), size)


def _half(tensor: Tensor, side: int) -> Parameter:
    flat = tensor.detach().reshape(-1)
    return Parameter(flat.tensor_split([(flat.numel() + 1) // 2])[side].clone())
