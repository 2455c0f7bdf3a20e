"""Adafactor and CAME against the originals themselves: options, cases, and what ranks run."""

from __future__ import annotations

import itertools
import json
from typing import Any

import came_pytorch
import torch
import transformers.optimization
from conformance_cases import CASES, Case, Sizes, gradient, initial, process_mesh
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd import CAME, Adafactor
from colossal_bcd.testing import storages
from support.errors import largest_error

STEPS = 12
ORIGINALS = {
    "Adafactor": (Adafactor, transformers.optimization.Adafactor),
    "CAME": (CAME, came_pytorch.CAME),
}
OTHER_NUMBERS = {"eps": (1e-6, 0.3), "clip_threshold": 0.4, "decay_rate": -0.5}
STEP_SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"warmup_init": True},
    {"lr": 1e-2, "relative_step": False},
)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adafactor": [
        {**size, **numbers, "scale_parameter": scale, "beta1": beta1, "weight_decay": decay}
        for size, numbers, scale, beta1, decay in itertools.product(
            STEP_SIZES, ({}, OTHER_NUMBERS), (True, False), (None, 0.9), (0.0, 0.1)
        )
    ],
    "CAME": [
        {"lr": 1e-2, **numbers, "weight_decay": decay}
        for numbers, decay in itertools.product(
            ({}, {"eps": (1e-6, 1e-4), "clip_threshold": 0.4, "betas": (0.8, 0.9, 0.95)}), (0.0, 0.1)
        )
    ],
}
ON_MESHES: dict[str, list[dict[str, Any]]] = {
    "Adafactor": [
        {},
        {"warmup_init": True, "weight_decay": 0.1, **OTHER_NUMBERS},
        {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
        {"lr": 1e-2, "relative_step": False, "scale_parameter": False, **OTHER_NUMBERS},
        {"scale_parameter": False, "beta1": 0.9, "weight_decay": 0.1},
    ],
    "CAME": OPTIONS["CAME"][1:3],
}
MESHES = [Sizes(2, 1), Sizes(1, 2), Sizes(1, 3), Sizes(2, 2)]


def groups_of(params: list[Parameter], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups; the second one has numbers of its own."""
    own: dict[str, Any] = {"weight_decay": 0.05}
    if "lr" in options:
        own["lr"] = 3e-2
    return [{"params": params[::2]}, {"params": params[1::2], **own}]


def on_one_process(name: str, options: dict[str, Any]) -> float:
    """Largest error of ours against the original on whole tensors in float64, after any step."""
    cls, original = ORIGINALS[name]
    ours, theirs = ([Parameter(initial(i).clone()) for i in range(len(CASES))] for _ in range(2))
    optimizers = cls(groups_of(ours, options), **options), original(groups_of(theirs, options), **options)
    worst = 0.0
    for step in range(STEPS):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for index, param in enumerate(params):
                param.grad = gradient(index, step)
            optimizer.step()
        worst = max(worst, largest_error(ours, theirs))
    return worst


def bound_to(sizes: Sizes, name: str, options: dict[str, Any]) -> float:
    """As `on_one_process`, with ours on this rank's shards."""
    cls, original = ORIGINALS[name]
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layouts = [case.layout(sizes, tp_rank, zero_rank) for case in CASES]

    def local(index: int, full: Tensor) -> Tensor:
        part = layouts[index].shard(full)
        part.view(-1)[layouts[index].num_local :] = float("nan")
        return part

    theirs = [Parameter(initial(index).clone()) for index in range(len(CASES))]
    ours = [Parameter(local(index, initial(index))) for index in range(len(CASES))]
    optimizers = cls(groups_of(ours, options), **options), original(groups_of(theirs, options), **options)
    optimizers[0].bind(dict(zip(ours, layouts, strict=True)), mesh)
    worst = 0.0
    for step in range(STEPS):
        for index in range(len(CASES)):
            grad = gradient(index, step)
            theirs[index].grad = grad
            ours[index].grad = None if grad is None else local(index, grad)
        for optimizer in optimizers:
            optimizer.step()
        for a, b, layout in zip(ours, theirs, layouts, strict=True):
            got, want = (part.view(-1)[: layout.num_local] for part in (a.detach(), layout.shard(b.detach())))
            worst = max(worst, largest_error(got, want))
    return worst


def on_mesh(sizes: Sizes) -> dict[str, float]:
    """Errors of all options of `ON_MESHES` on this rank."""
    return {
        f"{name} {json.dumps(options)}": bound_to(sizes, name, options)
        for name, several in ON_MESHES.items()
        for options in several
    }


def state_bytes(sizes: Sizes, cases: dict[str, Case]) -> dict[str, Any]:
    """Place of this rank, and bytes of all tensors in the float32 state of each case after one step, by optimizer."""
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    result: dict[str, Any] = {"tp": tp_rank, "zero": zero_rank}
    for name, options in (("Adafactor", {}), ("CAME", {"lr": 1e-2})):
        result[name] = {}
        for label, case in cases.items():
            layout = case.layout(sizes, tp_rank, zero_rank)
            param = Parameter(torch.ones(layout.local_shape))
            optimizer = ORIGINALS[name][0]([param], **options)
            optimizer.bind({param: layout}, mesh)
            param.grad = torch.ones_like(param)
            optimizer.step()
            result[name][label] = sum(storages(optimizer.state[param]).values())
    return result
