"""Whether all ranks were given the same model and optimizer, before anything communicates about them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Mapping, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from colossal_bcd.block.trained import trained_of

Setup = dict[str, dict[str, Any]]
"""Subject -> name -> a short value; the same names and values on ranks that agree."""

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum)
"""Types whose `repr` says all of a value, and the same on every rank."""


def require_same_options(model: nn.Module, optimizer: Any, group: dist.ProcessGroup | None = None) -> None:
    """Compare what this rank was given with what the others were: one exchange of names and numbers.

    Args:
        model: not wrapped yet.
        optimizer: the user's.
        group: the ranks that must agree, which errors number; None: all.
    Raises:
        ValueError: on every rank, naming the ranks and what differs.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    everyone: list[Setup] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, _setup(model, optimizer), group=group)
    first = everyone[0]
    for subject in first:
        different = [rank for rank, setup in enumerate(everyone) if setup.get(subject) != first[subject]]
        if different:
            detail = _differences(everyone[different[0]].get(subject, {}), first[subject])
            raise ValueError(
                f"boost: the {subject} of ranks {different} differs from that of rank 0: {detail}. Construct the same "
                "model and optimizer, with the same arguments and seed, on every rank."
            )


def _setup(model: nn.Module, optimizer: Any) -> Setup:
    names = {id(param): name for name, param in model.named_parameters()}
    kinds = {"class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"}
    shapes = {name: f"{tuple(param.shape)} {param.dtype}" for name, param in model.named_parameters()}
    if not isinstance(optimizer, Optimizer):
        return {"model": shapes, "optimizer": kinds}
    trained = trained_of(optimizer)
    base, members = trained.base_optimizer, trained.members
    setup: Setup = {
        "model": shapes,
        "optimizer": {**kinds, "base": f"{type(base).__module__}.{type(base).__qualname__}", "groups": len(members)},
    }
    for index, (group, params) in enumerate(zip(base.param_groups, members, strict=True)):
        listed = [names.get(id(param), "a parameter of another model") for param in params]
        setup[f"param group {index}"] = {
            **{name: _plain(value) for name, value in group.items() if name != "params"},
            "parameters": f"{len(listed)} ({_digest(listed)})",
        }
    if not trained.plan.is_whole:
        identity = trained.plan.identity()
        blocks = identity.pop("blocks")
        setup["block schedule"] = {
            **identity,
            "blocks": [name for name, _ in blocks],
            "parameters of the blocks": _digest(blocks),
        }
    return setup


def _plain(value: Any) -> str:
    """What ranks can compare of a value of a param group: nothing of it is an address, which differs on every rank.

    Functions count by their qualified name, and objects of other classes by their type alone.
    """
    if isinstance(value, Tensor):
        return repr(value.tolist())
    if value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum)
    ):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_plain(key)}: {_plain(each)}" for key, each in value.items()) + "}"
    if isinstance(value, Set):
        return "{" + ", ".join(sorted(map(_plain, value))) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_plain, value)) + ")"
    if isinstance(value, functools.partial):
        return f"partial({_plain(value.func)}, {_plain(value.args)}, {_plain(value.keywords)})"
    kind = type(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{kind.__qualname__}{_plain(fields)}"
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return f"{getattr(value, '__module__', None)}.{name}"
    return f"a {kind.__module__}.{kind.__qualname__}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def _differences(theirs: dict[str, Any], first: dict[str, Any], limit: int = 3) -> str:
    names = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
    shown = ", ".join(f"{name} {theirs.get(name)} instead of {first.get(name)}" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
