"""What ranks run over `fully_shard`."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from colossal_bcd.fsdp.cpu import enable_cpu
from colossal_bcd.fsdp.torch_private import MixedPrecisionPolicy, fully_shard
from support.errors import largest_error, worst


class Tied(nn.Module):
    """Layers of odd widths between an embedding and a head that is the same weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(2))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 23, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def tied(dtype=torch.float64):
    torch.manual_seed(0)
    return Tied().to(dtype)


def loss_of(model, batch):
    tokens = torch.randint(0, 23, (3, 6), generator=torch.Generator().manual_seed(batch))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def device_mesh(hsdp=False):
    world = dist.get_world_size()
    return init_device_mesh("cpu", (2, world // 2) if hsdp else (world,), mesh_dim_names=("a", "b") if hsdp else None)


def shard(model, mesh, **options):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def average_of_gradients(num_ranks, dtype, num_batches):
    """Of all ranks' batches on one process."""
    model = tied(dtype)
    for batch in range(num_ranks * num_batches):
        (loss_of(model, batch) / num_ranks).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def gradients_on_cpu(dtype, hsdp, num_batches):
    """Largest difference of this rank's part of the gradients from the average of all ranks on one process."""
    enable_cpu()
    rank, world = dist.get_rank(), dist.get_world_size()
    want = average_of_gradients(world, dtype, num_batches)
    errors = []
    for options in (
        {},
        {"reshard_after_forward": False},
        {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)},
    ):
        model = shard(tied(dtype), device_mesh(hsdp), **options)
        for batch in range(num_batches):
            loss_of(model, rank * num_batches + batch).backward()
        found = {name: param.grad.full_tensor() for name, param in model.named_parameters()}
        errors.append(largest_error(found, want))
    return worst(errors)


def refused_on_cpu():
    """torch 2.5 alone on CPUs: what it raises."""
    model = shard(tied(), device_mesh())
    try:
        loss_of(model, 0)
    except RuntimeError as error:
        return str(error)
    return None
