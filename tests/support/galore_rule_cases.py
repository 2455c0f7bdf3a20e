"""What ranks run in test_galore_rules.py: every inner rule on shards of the same matrices, against textbook code."""

from __future__ import annotations

import functools
from typing import Any

import galore_references
import torch
from conformance_cases import Case, Sizes, process_mesh
from torch import Tensor

from colossal_bcd import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD
from colossal_bcd.low_rank.galore import GaLore
from colossal_bcd.testing import CollectiveCounter
from support.errors import largest_error

STEPS, GAP, RANK = 8, 3, 4
CASES = [
    Case(shape=(64, 48)),
    Case(shape=(30, 50), dim=0),
    Case(shape=(30, 50), dim=1),
    Case(shape=(33, 7)),
    Case(shape=(24, 24), dim=1),
    Case(shape=(96, 48), dim=0, sections=(32, 32, 32)),
    Case(shape=(48, 96), dim=1, sections=(32, 32, 32)),
    Case(shape=(10, 16), dim=0, padded=64),
    Case(shape=(8, 4, 3, 3), dim=0),
    Case(shape=(8, 4, 6), dim=1),
    Case(shape=(8, 3, 6), dim=2),
    Case(shape=(64,)),
    Case(shape=(7,)),
]
EXACT = {"relative_step": False}
RULES: dict[str, tuple[type[GaLore], Any, dict[str, Any]]] = {
    "adamw": (GaLoreAdamW, galore_references.galore_adamw, {}),
    "adamw-biased": (GaLoreAdamW, galore_references.galore_adamw, {"correct_bias": False}),
    "sgd": (GaLoreSGD, galore_references.galore_sgd, {}),
    "sgd-momentum": (GaLoreSGD, galore_references.galore_sgd, {"momentum": 0.9, "dampening": 0.2}),
    "sgd-nesterov": (GaLoreSGD, galore_references.galore_sgd, {"momentum": 0.9, "nesterov": True}),
    "adafactor": (GaLoreAdafactor, galore_references.galore_adafactor, {**EXACT, "clip_threshold": 0.7}),
    "adafactor-momentum": (
        GaLoreAdafactor,
        galore_references.galore_adafactor,
        {**EXACT, "beta1": 0.9, "scale_parameter": False},
    ),
    # A full projection by singular vectors is diagonal at a refresh: next to it there is rounding, 1e-15, which Adam
    # divides by itself and eps.
    "adamw8bit": (GaLoreAdamW8bit, galore_references.galore_8bit, {"state_bits": 32, "eps": 1e-4}),
}
GOLORE = {"random_from_step": 4, "reproject_momentum": True}


def weight(index: int) -> Tensor:
    return torch.randn(CASES[index].shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


@functools.cache
def gradient(index: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * index + step)
    return torch.randn(CASES[index].shape, generator=generator, dtype=torch.float64)


def make(rule: str, params: list[Any], options: dict[str, Any]) -> GaLore:
    cls, _, hyper = RULES[rule]
    matrices = [param for param, case in zip(params, CASES, strict=True) if len(case.shape) > 1]
    vectors = [param for param, case in zip(params, CASES, strict=True) if len(case.shape) == 1]
    projected = {"params": matrices, "rank": RANK, "update_proj_gap": GAP}
    make: Any = cls
    return make([projected, {"params": vectors}], lr=1e-2, weight_decay=0.1, **hyper, **options)


def by_reference(rule: str, options: dict[str, Any]) -> list[Tensor]:
    """The weights after the last step; state entries that the package has, too, under the names of the references."""
    result = []
    for index in range(len(CASES)):
        now, state = weight(index), {"key": index}
        options = {"rank": RANK, "update_proj_gap": GAP, **options}
        # A setting of storage, which textbook code knows nothing of.
        hyper = {key: value for key, value in RULES[rule][2].items() if key != "state_bits"}
        for step in range(STEPS):
            now = RULES[rule][1](now, gradient(index, step), state, lr=1e-2, weight_decay=0.1, **hyper, **options)
        result.append(now)
    return result


def alone(rule: str, options: dict[str, Any]) -> list[Tensor]:
    params = [torch.nn.Parameter(weight(index)) for index in range(len(CASES))]
    optimizer = make(rule, params, options)
    for step in range(STEPS):
        for index, param in enumerate(params):
            param.grad = gradient(index, step)
        optimizer.step()
    return [param.detach() for param in params]


def worst(rule: str, options: dict[str, Any], sizes: Sizes) -> tuple[float, dict[str, int]]:
    """Largest error of this rank's part against textbook code, and collectives of a step between refreshes."""
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layouts = [case.layout(sizes, tp_rank, zero_rank) for case in CASES]
    params = [torch.nn.Parameter(layout.shard(weight(i))) for i, layout in enumerate(layouts)]
    optimizer = make(rule, params, options)
    optimizer.bind(dict(zip(params, layouts, strict=True)), mesh)
    calls: dict[str, int] = {}
    for step in range(STEPS):
        for index, (param, layout) in enumerate(zip(params, layouts, strict=True)):
            param.grad = layout.shard(gradient(index, step))
        with CollectiveCounter() as counter:
            optimizer.step()
        if step == 1:
            calls = dict(counter.calls)
    error = 0.0
    for param, layout, want in zip(params, layouts, by_reference(rule, options), strict=True):
        data = slice(0, layout.num_local)
        error = max(error, largest_error(param.detach().view(-1)[data], layout.shard(want).view(-1)[data]))
    return error, calls


def all_rules(sizes: Sizes) -> dict[str, tuple[float, dict[str, int]]]:
    found = {}
    for rule in RULES:
        found[rule] = worst(rule, {}, sizes)
        found[f"{rule}-golore-full"] = worst(rule, {**GOLORE, "proj_type": "full"}, sizes)
        found[f"{rule}-reverse"] = worst(rule, {**GOLORE, "proj_type": "reverse_std"}, sizes)
    return found
