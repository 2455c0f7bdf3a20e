"""What ranks run in test_canonical.py: the conformance cases, their state as files have it."""

from __future__ import annotations

import io
from typing import Any

import torch
from conformance_cases import CASES, Case, Sizes, process_mesh
from torch import Tensor

from colossal_bcd import CAME, Adafactor, AdamW, GaLoreAdafactor, GaLoreAdamW, GaLoreSGD
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.state.filed import allocate, filed_tensors, read, write
from support.errors import largest_error

STEPS = 4
EXPERTS = Case(shape=(4, 6, 10), dim=0)
"""A batch of matrices that is divided over them."""
SHAPES = [
    *CASES,
    EXPERTS,
    *(Case(shape=(4, 6, 10), dim=dim) for dim in (1, 2)),
    *(Case(shape=(5, 4, 6, 2), dim=dim) for dim in (1, 2, 3)),
    Case(shape=(5, 3, 12), dim=2, sections=(4, 6, 2)),
]
MAKE: dict[str, Any] = {
    "adamw": lambda params: AdamW(params),
    "adafactor": lambda params: Adafactor(params, beta1=0.9),
    "came": lambda params: CAME(params, lr=1e-2),
    "galore-right": lambda params: galore(params, "right"),
    "galore-left": lambda params: galore(params, "left"),
    "galore-full": lambda params: galore(params, "full"),
    "galore-sgd": lambda params: galore(params, "left", GaLoreSGD, momentum=0.9),
    "galore-adafactor-right": lambda params: galore(params, "right", GaLoreAdafactor, beta1=0.9),
    "galore-adafactor-left": lambda params: galore(params, "left", GaLoreAdafactor, beta1=0.9),
    "galore-adafactor-full": lambda params: galore(params, "full", GaLoreAdafactor, beta1=0.9),
}


def galore(params: list[Tensor], side: str, cls: Any = GaLoreAdamW, **options: Any) -> ShardedOptimizer:
    """Rank 3 where the global matrix, which `shapes` says, is large enough."""
    own = [
        {"params": [param], "rank": 3 if projectable(case) else None}
        for param, case in zip(params, SHAPES, strict=True)
    ]
    return cls(own, svd_method="random", proj_type=side, **options)


def projectable(case: Case) -> bool:
    return len(case.shape) >= 2 and min(case.shape[0], torch.Size(case.shape[1:]).numel()) >= 3


def grad_of(index: int, step: int) -> Tensor:
    return torch.randn(SHAPES[index].shape, generator=torch.Generator().manual_seed(1000 * step + index)).double()


def start_of(index: int) -> Tensor:
    return torch.randn(SHAPES[index].shape, generator=torch.Generator().manual_seed(index)).double()


def train(optimizer: ShardedOptimizer, params: list[Tensor], part: Any) -> None:
    for step in range(STEPS):
        for index, param in enumerate(params):
            param.grad = part(index, grad_of(index, step))
        optimizer.step()


def alone(name: str) -> list[dict[str, Tensor]]:
    """State of every case on one process."""
    params = [torch.nn.Parameter(start_of(index)) for index in range(len(SHAPES))]
    optimizer = MAKE[name](params)
    train(optimizer, params, lambda _, grad: grad)
    return [{k: v for k, v in optimizer.state[param].items() if isinstance(v, Tensor)} for param in params]


def group_of(optimizer: ShardedOptimizer, param: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(param is other for other in group["params"]))


def sharded(sizes: Sizes, name: str, expected: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Of every case the entries that this rank would send, and the largest error of what it would take."""
    mesh, tp_rank, zero_rank = process_mesh(sizes)
    layouts = [case.layout(sizes, tp_rank, zero_rank) for case in SHAPES]
    params = [torch.nn.Parameter(layout.shard(start_of(index))) for index, layout in enumerate(layouts)]
    optimizer = MAKE[name](params)
    optimizer.bind(dict(zip(params, layouts, strict=True)), mesh)
    train(optimizer, params, lambda index, grad: layouts[index].shard(grad))
    found = []
    for param, layout, whole in zip(params, layouts, expected, strict=True):
        entries = filed_tensors(optimizer, param, layout, group_of(optimizer, param))
        sent = {entry.name: (entry, read(entry, optimizer.state[param])) for entry in entries if entry.kept}
        before = {key: value for key, value in optimizer.state.pop(param).items() if isinstance(value, Tensor)}
        allocate(optimizer, param, layout, group_of(optimizer, param))
        for entry in entries:
            if entry.kept:
                source = (
                    whole[entry.name] if entry.name in whole else whole[entry.mean_of].view(layout.shape[:-1]).mean(-1)
                )
                write(entry, optimizer.state[param], entry.region.pick(source.view(entry.region.shape)))
        after = optimizer.state[param]
        found.append(
            {
                "sent": sent,
                "error": largest_error({key: after[key] for key in before}, before),
                "absent": [e.name for e in entries if not e.kept],
            }
        )
    return found


def sharded_each(sizes: Sizes, expected: bytes) -> dict[str, list[dict[str, Any]]]:
    """`sharded` of every optimizer; what is expected of them as `torch.save` has written it."""
    return {
        name: sharded(sizes, name, states)
        for name, states in torch.load(io.BytesIO(expected), weights_only=True).items()
    }
