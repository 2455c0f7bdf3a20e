"""Saves and loads of torch.distributed.checkpoint on several meshes."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from colossal_bcd.fsdp.torch_private import fully_shard
from colossal_bcd.sharding.dtensor import MeshAxes, layout_of, local_values
from support.errors import largest_error, worst
from support.fsdp_optimizer_cases import OPTIMIZERS, make, sharded_like

SHAPES = {"up": (8, 6), "down": (6, 8), "kernel": (4, 2, 3, 3), "few": (2, 5), "row": (1, 6), "bias": (3,)}
"""On three and four ranks some have no part of `few`, `row` and `bias`; tensor parallelism divides `up` and `down`."""
NAMES = [name for name in OPTIMIZERS if not name.endswith("8bit")]


def model_on(tp):
    """Parameters of float64 on all ranks, `tp` of which divide two of them first."""
    model, world = nn.Module(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("fsdp", "tp"))
    for index, (name, shape) in enumerate(SHAPES.items()):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        if tp > 1 and name in ("up", "down"):
            value = distribute_tensor(value, mesh["tp"], [Shard({"up": 0, "down": 1}[name])])
        model.register_parameter(name, nn.Parameter(value))
    fully_shard(model, mesh=mesh["fsdp"])
    return model


def advance(model, optimizer, steps):
    for step in steps:
        for index, (name, param) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            param.grad = sharded_like(torch.randn(SHAPES[name], generator=generator, dtype=torch.float64), param)
        optimizer.step()
    for param in model.parameters():
        param.grad = None


def saved(folder, tp):
    """Train, save, train on, and write what comes out."""
    for name in NAMES:
        model = model_on(tp)
        optimizer = make(name, model)
        advance(model, optimizer, range(3))
        state = {"model": dict(model.named_parameters()), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{name}")
        advance(model, optimizer, range(3, 6))
        full = {key: param.full_tensor().detach() for key, param in model.named_parameters()}
        if dist.get_rank() == 0:
            torch.save(full, f"{folder}/{name}.pt")


def loaded(folder, tp):
    """By optimizer: error after going on from the file."""
    errors = {}
    for name in NAMES:
        model = model_on(tp)
        optimizer = make(name, model)
        state = {"model": dict(model.named_parameters()), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optim"])
        advance(model, optimizer, range(3, 6))
        full = torch.load(f"{folder}/{name}.pt", weights_only=True)
        errors[name] = worst(
            largest_error(local_values(param), local_values(sharded_like(full[key], param)))
            for key, param in model.named_parameters()
        )
    return errors


def plain_round_trips():
    """By optimizer, 8 bits included: error of a twin that goes on from `state_dict`; whether some tensor is local."""
    found = {}
    for name in OPTIMIZERS:
        model, twin = model_on(1), model_on(1)
        optimizer, resumed = make(name, model), make(name, twin)
        advance(model, optimizer, range(3))
        state = optimizer.state_dict()
        whole = all(
            tuple(value.placements) is not None
            for each in state["state"].values()
            for value in each.values()
            if isinstance(value, torch.Tensor)
        )
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                local_values(theirs).copy_(local_values(ours))
        resumed.load_state_dict(state)
        advance(model, optimizer, range(3, 6))
        advance(twin, resumed, range(3, 6))
        found[name] = (
            whole,
            worst(
                largest_error(local_values(ours), local_values(theirs))
                for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True)
            ),
        )
    return found


def shapes_of_empty_ranks():
    """Column means of CAME on this rank: of `row` only the first rank has any."""
    model = model_on(1)
    optimizer = make("CAME", model)
    advance(model, optimizer, range(1))
    row = next(param for name, param in model.named_parameters() if name == "row")
    state = optimizer.state_dict()["state"][optimizer.key_of(row)]
    return layout_of(row, MeshAxes()).num_local, {
        name: (tuple(value.shape), value.to_local().double().sum().item())
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name.endswith("_col")
    }


OPTIONS = {
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
    "flat": {"flatten_optimizer_state_dict": True},
}
"""Of torch's `StateDictOptions`."""


def options_of_torch():
    """By option and optimizer: error of a twin that goes on from a state got and set with it, or why there is none."""
    return {way: {name: _with_options(name, given, way) for name in OPTIMIZERS} for way, given in OPTIONS.items()}


def _with_options(name, given, way):
    model, twin = model_on(1), model_on(1)
    optimizer, resumed = make(name, model), make(name, twin)
    advance(model, optimizer, range(3))
    getting = StateDictOptions(**{key: value for key, value in given.items() if key != "broadcast_from_rank0"})
    try:
        state = get_optimizer_state_dict(model, optimizer, options=getting)
        if way == "broadcast" and dist.get_rank() > 0:
            state = {}
        set_optimizer_state_dict(twin, resumed, optim_state_dict=state, options=StateDictOptions(**given))
    except (ValueError, NotImplementedError, RuntimeError, KeyError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            local_values(theirs).copy_(local_values(ours))
    advance(model, optimizer, range(3, 6))
    advance(twin, resumed, range(3, 6))
    return worst(
        largest_error(local_values(ours), local_values(theirs))
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True)
    )
