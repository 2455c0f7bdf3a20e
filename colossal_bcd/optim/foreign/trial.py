"""Trials: steps of twins on small tensors that stand for an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.optim.foreign.twin import TwinError, attributes, first_line, is_plain, new_copy, new_twin, unnoticed

SIZES: dict[int, tuple[int, ...]] = {0: (), 1: (10,), 2: (12, 10), 3: (4, 6, 5), 4: (4, 3, 3, 2)}
"""Shape of a twin's tensor by its number of dims."""

Tensors = list[list[Parameter]]
"""Of each param group."""


_MEMORY: dict[Any, Any] = {}


def remembered(optimizer: Optimizer, what: str, measure: Callable[[], Any]) -> Any:
    """Measure once for optimizers that differ in nothing that is measured."""
    options = [
        sorted((key, repr(value)) for key, value in group.items() if key not in ("params", "param_names"))
        for group in optimizer.param_groups
    ]
    own = sorted((name, repr(value)) for name, value in attributes(optimizer).items() if is_plain(value))
    key = (what, type(optimizer), repr(options), repr(own), repr(shapes_of(optimizer)), bool(optimizer.state))
    if key not in _MEMORY:
        if len(_MEMORY) >= 256:
            _MEMORY.clear()
        _MEMORY[key] = measure()
    return _MEMORY[key]


def shapes_of(optimizer: Optimizer) -> list[list[tuple[int, torch.dtype]]]:
    """Number of dims and dtype of the tensors that stand for each group's parameters."""
    return [
        sorted(
            {
                (param.dim(), torch.float64 if param.dtype == torch.float64 else torch.float32)
                for param in group["params"]
            },
            key=repr,
        )
        for group in optimizer.param_groups
    ]


def new_tensors(optimizer: Optimizer, device: torch.device, seed: int) -> Tensors:
    """Small random tensors for each param group: one of every number of dims and dtype in it."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            Parameter(torch.randn(SIZES.get(dims, (2,) * dims), generator=generator, dtype=dtype).to(device))
            for dims, dtype in kinds
        ]
        for kinds in shapes_of(optimizer)
    ]


def flat(tensors: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """The tensors of all groups."""
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
    """The tensors that an optimizer has in each group."""
    return [group["params"] for group in optimizer.param_groups]


def twin_of(optimizer: Optimizer, tensors: Tensors, leave_out: frozenset[str] = frozenset()) -> Optimizer:
    """A twin by the constructor, or a copy where that cannot be called and there is no state that it may have made."""
    try:
        return new_twin(optimizer, tensors, leave_out)
    except TwinError as error:
        if optimizer.state:
            raise TwinError(f"has state, and {error}") from error
        return new_copy(optimizer, tensors)


def run(twin: Optimizer, tensors: Tensors, steps: int, seed: int) -> None:
    """Steps with gradients that depend on the seed alone.

    Raises:
        TwinError: a step failed.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for tensor in flat(tensors):
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
        step_by_gradients(twin)


def step_by_gradients(twin: Optimizer) -> None:
    """Step.

    Raises:
        TwinError: that failed.
    """
    try:
        twin.step()
    except Exception as error:
        raise TwinError(
            f"cannot step tensors by their gradients alone ({type(error).__name__}: {first_line(error)})"
        ) from error
