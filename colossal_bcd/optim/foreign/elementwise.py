"""Whether an update of a value needs that value alone: steps of whole tensors against steps of their halves."""

from __future__ import annotations

import collections
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.optim.foreign.trial import (
    flat,
    members_of,
    new_tensors,
    on_some_device,
    remembered,
    step_by_gradients,
    twin_of,
)
from colossal_bcd.optim.foreign.twin import TwinError, equal, is_plain, is_record, reseed

SCALES = (1.0, 8.0, 0.2, 1.0, 30.0, 1.0, 0.01, 1.0, 2.0, 1.0, 0.5, 1.0)
"""Of the gradients of the steps that tell whether an update is element-wise; repeated."""
ELEMENTWISE_STEPS = 36
CLOSE = 1e-5
"""Relative difference that rounding may make in this many steps in float32: 36 * 2**-24 is 2e-6."""


def update_apart(optimizer: Optimizer) -> float:
    """How much an update depends on more than the value itself: the largest relative difference of halves from wholes.

    Twins step whole tensors, others the halves of the same tensors; NaN counts as infinitely different.

    Returns:
        0 but for rounding for an element-wise update, as a share of the largest change of a tensor.
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
        for tensor, before, *parts in zip(flat(whole), start, *map(flat, halves), strict=True):
            tensor.grad = _gradient(tensor.detach(), before, step, generator)
            cut = parts[0].numel()
            parts[0].grad, parts[1].grad = (part.clone() for part in tensor.grad.reshape(-1).tensor_split([cut]))
        reseed(device)
        step_by_gradients(twins[0])
        for twin in twins[1:]:
            reseed(device)
            try:
                step_by_gradients(twin)
            except TwinError:  # that of whole tensors went well
                return math.inf
    worst = 0.0
    for tensor, before, *parts in zip(flat(whole), start, flat(halves[0]), flat(halves[1]), strict=True):
        moved = (tensor.detach() - before).abs().max()
        apart = (torch.cat([part.detach() for part in parts]) - tensor.detach().reshape(-1)).abs().max()
        share = float(apart / moved) if moved > 0 else float(apart)
        worst = max(worst, share if math.isfinite(share) else math.inf)
    return worst if _knows_parts_alike(*twins) else max(worst, 1.0)


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


def _knows_parts_alike(whole: Optimizer, *halves: Optimizer) -> bool:
    """Whether what the twins keep would be the same if they were one, as far as that has no effect on weights yet.

    A number that halves know otherwise than the whole does is made from many values, and so is a tensor that is neither
    such a number nor as large as its parameter.
    """
    wholes, parts = _kept(whole), [_kept(half) for half in halves]
    for name, (value, size) in wholes.items():
        for kept in parts:
            other, other_size = kept.get(name, (None, 0))
            if isinstance(value, Tensor) and size > 1 and value.numel() > 1 and value.numel() % size == 0:
                if not isinstance(other, Tensor) or other.numel() * size != value.numel() * other_size:
                    return False
            elif not _close(value, other):
                return False
    return True


def _close(left: Any, right: Any) -> bool:
    if (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and left.shape == right.shape
        and left.is_floating_point()
    ):
        return torch.allclose(left, right, rtol=CLOSE, atol=0, equal_nan=True)
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=CLOSE) or (left != left and right != right)
    return equal(left, right)


def _kept(twin: Optimizer) -> dict[tuple[Any, ...], tuple[Any, int]]:
    """Everything that a twin keeps, under names that twins of other parts share, with the size of its parameter."""
    found: dict[tuple[Any, ...], tuple[Any, int]] = {}
    places = {param: place for place, param in enumerate(flat(members_of(twin)))}
    for index, group in enumerate(twin.param_groups):
        _collect(found, ("group", index), {key: value for key, value in group.items() if key != "params"}, 0)
    for key, value in twin.state.items():
        _collect(found, ("state", places.get(key, key)), value, key.numel() if isinstance(key, Tensor) else 0)
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
    cut = (flat.numel() + 1) // 2
    return Parameter((flat[:cut] if side == 0 else flat[cut:]).clone())
