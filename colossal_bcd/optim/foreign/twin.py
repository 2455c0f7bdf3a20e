"""Twins: other objects of an optimizer's class, with its hyper-parameters, which step small tensors for a trial."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Group = Mapping[str, Any]
Tensors = list[list[Parameter]]
"""Tensors of each param group."""

SIZES: dict[int, tuple[int, ...]] = {0: (), 1: (10,), 2: (12, 10), 3: (4, 6, 5), 4: (4, 3, 3, 2)}
"""Shape of a twin's tensor by its number of dims."""

LOWEST_RATE = 1e-6
"""Learning rates below it move few float32 values of a twin, or none."""

_MEASURED: dict[Any, Any] = {}
"""What `remembered` has measured."""


class MISSING:
    """Stands for a value that is not there; copies of a class are the class itself."""


_OF_TORCH = {"state", "param_groups", "defaults", "step", "zero_grad", "_opt_called", "_step_count"}
"""Attributes that torch and its schedulers set on every optimizer; a scheduler wraps the step of the one object."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class TwinError(Exception):
    """There is no other object of this class with these hyper-parameters to be had."""


def attributes(optimizer: Optimizer) -> dict[str, Any]:
    """List what an optimizer keeps on itself, apart from what torch keeps there."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _OF_TORCH and not name.startswith("_optimizer_") and not name.startswith("_zero_grad_profile")
    }


def is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, strings and containers of them alone."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(each) for key, each in value.items())
    return isinstance(value, _PLAIN)


def copied(value: Any) -> Any:
    """Make a copy that shares no container and no tensor with the value; other objects are shared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple, set)) and type(value) in (list, tuple, set):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {key: copied(each) for key, each in value.items()}
    return copy.deepcopy(value) if is_plain(value) else value


def equal(left: Any, right: Any) -> bool:
    """Whether two values are the same, tensors by all their values, NaN being NaN."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        same = left.shape == right.shape and left.dtype == right.dtype and left.layout == right.layout
        return same and bool(torch.eq(left, right).logical_or(left.ne(left) & right.ne(right)).all())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return bool(left == right) or (left != left and right != right)


def new_twin(
    optimizer: Optimizer, tensors: Sequence[Sequence[Tensor]], leave_out: frozenset[str] = frozenset()
) -> Optimizer:
    """Construct another optimizer over these tensors of each param group as this one was constructed.

    The constructor's arguments are looked up by name in the optimizer's defaults and attributes, and every group brings
    its own values; keys of groups and names of attributes in `leave_out` are left to the constructor.  Nothing of the
    optimizer is changed or shared.

    Raises:
        TwinError: the constructor asks for what cannot be found, or refuses it.
    """
    groups = [
        {"params": list(members), **{key: copied(value) for key, value in group.items() if key not in leave_out}}
        for members, group in zip(tensors, map(_values, optimizer.param_groups), strict=True)
    ]
    try:
        twin: Optimizer = type(optimizer)(groups, **_arguments(optimizer))
    except Exception as error:
        raise TwinError(
            f"its constructor cannot be called again ({type(error).__name__}: {first_line(error)})"
        ) from error
    present = attributes(twin)
    for name, value in attributes(optimizer).items():
        if name not in leave_out and is_plain(value) and not equal(present.get(name, MISSING), value):
            setattr(twin, name, copied(value))
    return twin


def new_copy(optimizer: Optimizer, tensors: Sequence[Sequence[Tensor]]) -> Optimizer:
    """Imitate an optimizer whose constructor cannot be called again: a copy of it, without state.

    The tensors of each param group also stand for the optimizer's parameters wherever it mentions them.

    Raises:
        TwinError: it keeps something that cannot be copied.
    """
    twin: Optimizer = type(optimizer).__new__(type(optimizer))
    Optimizer.__init__(twin, [{"params": []}], copied(optimizer.defaults))
    given = list(flat(members_of(optimizer)))
    memo: dict[int, Any] = {id(optimizer): twin}
    if len(given) == sum(map(len, tensors)):
        memo.update(zip(map(id, given), flat(tensors), strict=True))
    for name, value in attributes(optimizer).items():
        try:
            setattr(twin, name, copy.deepcopy(value, memo))
        except Exception as error:
            raise TwinError(f"its attribute {name!r} cannot be copied ({type(error).__name__})") from error
    twin.param_groups.clear()
    for members, group in zip(tensors, map(_values, optimizer.param_groups), strict=True):
        twin.param_groups.append({"params": list(members), **{key: copied(value) for key, value in group.items()}})
    return twin


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    text = str(error).strip().partition("\n")[0]
    return text if len(text) <= 160 else text[:157] + "..."


@contextlib.contextmanager
def unnoticed(device: torch.device) -> Iterator[None]:
    """Inside, random numbers are the same every time, and nobody outside sees, hears or is called by what happens."""
    hooks: list[Any] = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    kept = [dict(table) for table in hooks]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    silent = logging.root.manager.disable
    forked = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with warnings.catch_warnings(), torch.random.fork_rng(forked[0], device_type=forked[1]):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            for table in hooks:
                table.clear()
            reseed(device)
            yield
        finally:
            for table, before in zip(hooks, kept, strict=True):
                table.update(before)
            logging.disable(silent)
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])


def reseed(device: torch.device, seed: int = 0) -> None:
    """Begin the same random numbers again; only where that goes `unnoticed`."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def remembered(optimizer: Optimizer, what: str, measure: Callable[[], Any]) -> Any:
    """Measure once for optimizers that differ in nothing that is measured."""
    options = [
        sorted((key, repr(value)) for key, value in group.items() if key not in ("params", "param_names"))
        for group in optimizer.param_groups
    ]
    plain = sorted((name, repr(value)) for name, value in attributes(optimizer).items() if is_plain(value))
    key = (what, type(optimizer), repr(options), repr(plain), repr(shapes_of(optimizer)), bool(optimizer.state))
    if key not in _MEASURED:
        if len(_MEASURED) >= 256:
            _MEASURED.clear()
        _MEASURED[key] = measure()
    return _MEASURED[key]


def shapes_of(optimizer: Optimizer) -> list[list[tuple[int, torch.dtype]]]:
    """List number of dims and dtype of the tensors that stand for each group's parameters."""
    kinds = [
        {(param.dim(), torch.float64 if param.dtype == torch.float64 else torch.float32) for param in members}
        for members in members_of(optimizer)
    ]
    return [sorted(each, key=repr) for each in kinds]


def new_tensors(optimizer: Optimizer, device: torch.device, seed: int) -> Tensors:
    """Make small random tensors for each param group: one of every number of dims and dtype in it."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            Parameter(torch.randn(SIZES.get(dims, (2,) * dims), generator=generator, dtype=dtype).to(device))
            for dims, dtype in kinds
        ]
        for kinds in shapes_of(optimizer)
    ]


def flat(tensors: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Go through the tensors of all groups."""
    return (tensor for members in tensors for tensor in members)


def on_some_device(optimizer: Optimizer, measure: Callable[[Optimizer, torch.device], Any]) -> Any:
    """Measure on the CPU, or where that fails on the device of the parameters, whose kernels it may need."""
    devices = [torch.device("cpu"), *{param.device: None for param in flat(members_of(optimizer))}]
    devices = [device for device in dict.fromkeys(devices) if device.type != "meta"]
    for device in devices:
        try:
            with unnoticed(device):
                return measure(optimizer, device)
        except TwinError:
            if device == devices[-1]:
                raise
    raise AssertionError(devices)


def members_of(optimizer: Optimizer) -> list[list[Tensor]]:
    """List the tensors that an optimizer has in each group."""
    return [group["params"] for group in optimizer.param_groups]


def twin_of(optimizer: Optimizer, tensors: Tensors, leave_out: frozenset[str] = frozenset()) -> Optimizer:
    """Make a twin by the constructor, or a copy where that fails and there is no state that it may have made."""
    try:
        return new_twin(optimizer, tensors, leave_out)
    except TwinError as error:
        if optimizer.state:
            raise TwinError(f"has state, and {error}") from error
        return new_copy(optimizer, tensors)


def run(twin: Optimizer, tensors: Tensors, steps: int, seed: int) -> None:
    """Take steps with gradients that depend on the seed alone; raises TwinError where one fails."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for tensor in flat(tensors):
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
        step_by_gradients(twin)


def step_by_gradients(twin: Optimizer) -> None:
    """Take one step; raises TwinError where it fails."""
    try:
        twin.step()
    except Exception as error:
        raise TwinError(
            f"cannot step tensors by their gradients alone ({type(error).__name__}: {first_line(error)})"
        ) from error


def _values(group: Group) -> dict[str, Any]:
    """Copy a group without its parameters and what is said about each of them.

    Where a scheduler has set the rate to zero for now, as before a warm-up, a twin gets one that moves it.
    """
    values = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    rate = values.get("lr")
    if isinstance(rate, (int, float, Tensor)) and rate < LOWEST_RATE:
        values["lr"] = rate + 1e-2
    return values


def _arguments(optimizer: Optimizer) -> dict[str, Any]:
    """Find arguments of the constructor beside the parameters, as far as anything has their names."""
    sources = [optimizer.defaults, attributes(optimizer)]
    sources += [vars(value) for value in attributes(optimizer).values() if is_record(value)]
    found: dict[str, Any] = {}
    constructors = [cls.__dict__["__init__"] for cls in type(optimizer).__mro__ if "__init__" in cls.__dict__]
    for depth, constructor in enumerate(constructors):
        if constructor in (Optimizer.__init__, object.__init__):
            break
        parameters = list(inspect.signature(constructor).parameters.values())[2:]
        for parameter in parameters:
            name = parameter.name
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in {*found, "defaults"}:
                continue
            value = next((source[name] for source in sources if name in source), MISSING)
            if value is MISSING or (depth and equal(value, parameter.default)):
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise TypeError(f"{name!r} is taken by position only")
            found[name] = copied(value)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def is_record(value: Any) -> bool:
    """Whether a value is an object with attributes of its own, such as a namespace of options."""
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, (Tensor, Optimizer))
