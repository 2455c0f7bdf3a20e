"""What ranks run in test_galore.py: GaLore and GoLore on shards of the same matrices on any mesh."""

from __future__ import annotations

from typing import Any

import torch
from conformance_cases import Case, Sizes, process_mesh
from torch import Tensor

from colossal_bcd import GaLoreAdamW
from colossal_bcd.testing import CollectiveCounter
from support.errors import largest_error

STEPS = 8
GAP = 3
RANK = 4
CASES = [
    Case(shape=(64, 48)),
    Case(shape=(64, 48), dim=0),
    Case(shape=(64, 48), dim=1),
    Case(shape=(30, 50), dim=0),
    Case(shape=(30, 50), dim=1),
    Case(shape=(33, 7)),
    Case(shape=(24, 24), dim=0),
    Case(shape=(24, 24), dim=1),
    Case(shape=(96, 48), dim=0, sections=(32, 32, 32)),
    Case(shape=(48, 96), dim=1, sections=(32, 32, 32)),
    Case(shape=(1000, 16), dim=0, padded=1024),
    Case(shape=(10, 16), dim=0, padded=64),
    Case(shape=(8, 4, 3, 3), dim=0),
    Case(shape=(64,)),
    Case(shape=(7,)),
]


def weight(index: int) -> Tensor:
    return torch.randn(CASES[index].shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def gradient(index: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * index + step)
    return torch.randn(CASES[index].shape, generator=generator, dtype=torch.float64)


def optimizer_of(params: list[Any], hyper: dict[str, Any]) -> GaLoreAdamW:
    matrices = [param for param, case in zip(params, CASES, strict=True) if len(case.shape) > 1]
    vectors = [param for param, case in zip(params, CASES, strict=True) if len(case.shape) == 1]
    projected = {"params": matrices, "rank": RANK, "update_proj_gap": GAP}
    return GaLoreAdamW([projected, {"params": vectors}], lr=1e-2, weight_decay=0.1, **hyper)


def one_process(hyper: dict[str, Any]) -> list[Tensor]:
    params = [torch.nn.Parameter(weight(index)) for index in range(len(CASES))]
    optimizer = optimizer_of(params, hyper)
    for step in range(STEPS):
        for index, param in enumerate(params):
            param.grad = gradient(index, step)
        optimizer.step()
    return [param.detach() for param in params]


def sharded(sizes: Sizes, hyper: dict[str, Any]) -> dict[str, Any]:
    """Largest error against one process, collectives of a step between refreshes and at one, and the bases."""
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layouts = [case.layout(sizes, tp_rank, zero_rank) for case in CASES]
    params = [torch.nn.Parameter(layout.shard(weight(i))) for i, layout in enumerate(layouts)]
    optimizer = optimizer_of(params, hyper)
    optimizer.bind(dict(zip(params, layouts, strict=True)), mesh)
    calls = []
    for step in range(STEPS):
        for index, (param, layout) in enumerate(zip(params, layouts, strict=True)):
            param.grad = layout.shard(gradient(index, step))
        with CollectiveCounter() as counter:
            optimizer.step()
        calls.append(dict(counter.calls))
    worst = 0.0
    for param, layout, want in zip(params, layouts, one_process(hyper), strict=True):
        data = slice(0, layout.num_local)
        worst = max(worst, largest_error(param.detach().view(-1)[data], layout.shard(want).view(-1)[data]))
    bases = [state[name] for state in optimizer.state.values() for name in ("left", "right") if name in state]
    held = [state["exp_avg"].numel() for state in optimizer.state.values()]
    return {"error": worst, "between": calls[1], "refresh": calls[GAP], "bases": bases, "held": held}


def poisoned(sizes: Sizes, step_of_nan: int) -> dict[str, Any]:
    """One value of one gradient is no number at a refresh."""
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    case = Case(shape=(24, 16), dim=0)
    layout = case.layout(sizes, tp_rank, zero_rank)
    param = torch.nn.Parameter(layout.shard(torch.ones(case.shape)))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 3, "update_proj_gap": 2}])
    optimizer.bind({param: layout}, mesh)
    bases = []
    for step in range(4):
        grad = torch.randn(case.shape, generator=torch.Generator().manual_seed(step))
        if step == step_of_nan:
            grad[5, 5] = float("nan")
        param.grad = layout.shard(grad)
        optimizer.step()
        bases.append(optimizer.state[param]["right"].clone())
    return {"bases": bases}
