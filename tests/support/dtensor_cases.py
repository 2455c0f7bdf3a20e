"""Layouts of DTensors on real ranks, made by torch's own functions."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from colossal_bcd.sharding.dtensor import MeshAxes, is_dtensor, layout_of, local_values

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard


class Net(nn.Module):
    """Shapes that do not divide: a vocabulary, one row, one value; tensor parallelism divides `up` and `down`."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(250, 3)
        self.up = nn.Linear(4, 12)
        self.down = nn.Linear(12, 5)
        self.kernel = nn.Parameter(torch.empty(7, 2, 3, 3))
        self.row = nn.Parameter(torch.empty(1, 6))
        self.one = nn.Parameter(torch.empty(1))
        self.few = nn.Parameter(torch.empty(3))


def net():
    """Every value of the whole model is another one."""
    model, start = Net().double(), 0
    for param in model.parameters():
        param.data = torch.arange(start, start + param.numel(), dtype=torch.float64).view(param.shape)
        start += param.numel()
    return model


def difference(tensor, whole, axes):
    """What is wrong with the layout of one tensor; nothing if it is right."""
    layout, local = layout_of(tensor, axes), local_values(tensor)
    inner = tensor.to_local() if is_dtensor(tensor) else tensor
    problems = []
    if not torch.equal(local.reshape(-1), layout.shard(whole).reshape(-1)[: layout.num_local]):
        problems.append(f"{layout} has {layout.shard(whole)}, but {local} is stored")
    if local.data_ptr() != inner.data_ptr() or local.requires_grad:
        problems.append("is a copy or of the graph")
    if layout.shape != tuple(whole.shape) or local.numel() > layout.max_local:
        problems.append(f"{layout} for {tuple(whole.shape)}")
    mesh = axes.mesh()
    for part in (layout.split, layout.slice):
        if part is not None and (part.size, part.rank) != (mesh.size(part.axis), mesh.rank(part.axis)):
            problems.append(f"{part} is not of the mesh")
    return problems


def sharded(how):
    """The model as `how` says: "fsdp", "hsdp", "tp", "tp-fsdp" or "tp-hsdp"."""
    model, world = net(), dist.get_world_size()
    if "tp" in how:
        shape = {"tp": (2,), "tp-fsdp": (world // 2, 2), "tp-hsdp": (2, world // 4, 2)}[how]
        names = {1: ("tp",), 2: ("fsdp", "tp"), 3: ("replicas", "fsdp", "tp")}[len(shape)]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if len(shape) == 1:
            return model
        data = mesh[names[:-1]] if len(shape) == 3 else mesh["fsdp"]
    else:
        data = init_device_mesh(
            "cpu", (2, world // 2) if how == "hsdp" else (world,), mesh_dim_names=("a", "b")[: 1 + (how == "hsdp")]
        )
    fully_shard(model.up, mesh=data)
    fully_shard(model, mesh=data)
    return model


def layouts_of_models(hows):
    """By kind of sharding: problems and layouts of every parameter, and the axes with their ranks."""
    found = {}
    for how in hows:
        axes, whole = MeshAxes(), dict(net().named_parameters())
        named = dict(sharded(how).named_parameters())
        problems = {name: difference(param, whole[name].detach(), axes) for name, param in named.items()}
        layouts = {name: layout_of(param, axes) for name, param in named.items()}
        found[how] = (
            problems,
            layouts,
            {axis: axes.mesh().size(axis) for layout in layouts.values() for axis in layout.axes},
        )
    return found


def layouts_of_placements():
    """Problems of what `distribute_tensor` divides over two by two ranks, and the words of refusals."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    line = init_device_mesh("cpu", (4,))
    cases = {
        "scalar": ((), mesh, [Replicate(), Replicate()]),
        "columns": ((3, 8), line, [Shard(1)]),
        "middle": ((3, 4, 5), line, [Shard(1)]),
        "rows twice": ((6, 3), mesh, [Shard(0), Shard(0)]),
        "rows, columns": ((5, 4), mesh, [Shard(0), Shard(1)]),
        "columns, rows": ((5, 4), mesh, [Shard(1), Shard(0)]),
        "replicas": ((5, 4), mesh, [Shard(0), Replicate()]),
        "no rows": ((0, 4), line, [Shard(0)]),
        "fewer rows than ranks": ((2, 4), line, [Shard(0)]),
        "whole": ((5, 4), None, None),
    }
    found, axes = {}, MeshAxes()
    for name, (shape, where, placements) in cases.items():
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
        tensor = whole if where is None else distribute_tensor(whole, where, placements)
        found[name] = difference(tensor, whole, axes)
        with torch.inference_mode():
            found[name] += [] if torch.equal(local_values(tensor), local_values(tensor)) else ["no inference mode"]
    refused = {
        "uneven columns": ((3, 7), line, [Shard(1)]),
        "uneven rows, rows": ((5, 3), mesh, [Shard(0), Shard(0)]),
        "columns twice": ((3, 8), mesh, [Shard(1), Shard(1)]),
        "neither is rows": ((3, 4, 4), mesh, [Shard(1), Shard(2)]),
        "descending": ((8, 3), DeviceMesh("cpu", [3, 2, 1, 0]), [Shard(0)]),
    }
    words = {}
    for name, (shape, where, placements) in refused.items():
        words[name] = refusal(distribute_tensor(torch.zeros(shape), where, placements))
    words["partial"] = refusal(DTensor.from_local(torch.zeros(3), line, [Partial()]))
    pair = DeviceMesh("cpu", [0, 1])
    words["outside"] = refusal(DTensor.from_local(torch.zeros(3), pair, [Shard(0)], run_check=False))
    return found, words


def refusal(tensor):
    try:
        layout_of(tensor, MeshAxes())
    except ValueError as error:
        return str(error)
    return None


def equal_ranks_are_one_axis():
    """Two meshes of the same ranks, and one of others."""
    axes = MeshAxes()
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    again = init_device_mesh("cpu", (1, 4), mesh_dim_names=("c", "d"))
    return [
        axes.name("zero", line, 0),
        axes.name("tp", again, 1),
        axes.name("zero", square, 0),
        axes.name("tp", square, 1),
    ]
