"""What ranks run in test_fsdp_foreign.py: every optimizer of other packages as base of blocks on sharded weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist
from block_net import Net, tokens, wrap
from contract_cases import LAYERS, PERIOD, STEPS, expected
from foreign_optimizers import make
from torch.distributed.device_mesh import init_device_mesh

from colossal_bcd import fsdp
from support.errors import largest_error


def outcomes(names: list[str]) -> dict[str, tuple[str, Any]]:
    """Of every optimizer: ("refused", the message), or ("error", the largest of weights after the steps)."""
    fsdp.enable_cpu()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: outcome(name, mesh) for name in names}


def outcome(name: str, mesh: Any) -> tuple[str, Any]:
    model = Net(layers=LAYERS, width=5)
    for layer in model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    try:
        optimizer = wrap(model, make(name, model), verbose=0, switch_block_every=PERIOD)
        fsdp.attach(model, optimizer)
    except ValueError as error:
        return "refused", str(error)
    for step in range(STEPS[True]):
        model(tokens(10 * step + dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    got = [param.full_tensor().detach() for param in model.parameters()]
    return "error", largest_error(got, expected(name, True, becomes=lambda optimizer: optimizer))
