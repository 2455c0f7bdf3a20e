"""Collectives that are said, and made, where rules do not fit into one wave."""

from __future__ import annotations

import torch
from conformance_cases import Case, Sizes, process_mesh
from torch import nn

from colossal_bcd import Lamb
from colossal_bcd.memory.traffic import rounds_of_all
from colossal_bcd.testing import CollectiveCounter, run_ranks


def counted() -> tuple[int, int]:
    mesh, tp_rank, zero_rank = process_mesh(Sizes(1, 2))
    layout = Case(shape=(64, 64)).layout(Sizes(1, 2), tp_rank, zero_rank)
    params = [nn.Parameter(torch.ones(layout.local_shape)) for _ in range(40)]
    optimizer = Lamb(params, wave_bytes=16 * layout.max_local)
    optimizer.bind(dict.fromkeys(params, layout), mesh)
    for param in params:
        param.grad = torch.ones_like(param)
    with CollectiveCounter() as counter:
        optimizer.step()
    said = rounds_of_all(optimizer, dict.fromkeys(params, layout), mesh.communicates, [params])
    return counter.total, sum(map(len, said))


def test_what_a_step_is_said_to_send_counts_waves() -> None:
    made, said = run_ranks(2, counted)[0]
    assert made == said
