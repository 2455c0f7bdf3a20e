"""Optimizers over DTensors against themselves on one process, on identical gradients."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from colossal_bcd import SGD, AdamW, Lamb, estimate
from colossal_bcd.fsdp.cpu import enable_cpu
from colossal_bcd.optim.register import registered
from colossal_bcd.sharding.dtensor import MeshAxes, layout_of, local_values
from colossal_bcd.testing import CollectiveCounter, storages
from support.errors import largest_error, worst
from support.fsdp_cases import device_mesh, loss_of, shard, tied

OPTIMIZERS = {name: each.cls for name, each in registered("colossal_bcd.optim", "colossal_bcd.low_rank").items()}


def make(name, model, **options):
    """Matrices projected where the optimizer projects."""
    options |= {"relative_step": False} if "Adafactor" in name else {}
    options |= {"total_steps": 4} if name.startswith("GoLore") else {}
    options |= {"min_8bit_size": 0} if name.endswith("8bit") else {}
    projection = {"rank": 2, "update_proj_gap": 2, "clamp": True} if "Lore" in name else {}
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() < 2]
    return OPTIMIZERS[name]([{"params": matrices, **projection}, {"params": vectors, "lr": 3e-2}], lr=1e-2, **options)


def gradients(step, dtype):
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, param in tied(dtype).named_parameters()
    }


def sharded_like(full, param):
    layout = layout_of(param, MeshAxes())
    local = layout.shard(full).view(-1)[: layout.num_local].view(local_values(param).shape)
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def errors_to_one_process(name, dtype, num_steps, **options):
    """After each step, the largest difference of any weight on this rank; collectives of each step."""
    plain, model = tied(dtype), shard(tied(dtype), device_mesh())
    one, many = make(name, plain, **options), make(name, model, **options)
    errors = []
    for step in range(num_steps):
        full = gradients(step, dtype)
        for key, param in plain.named_parameters():
            param.grad = full[key].clone()
        for key, param in model.named_parameters():
            param.grad = sharded_like(full[key], param)
        one.step()
        many.step()
        whole = dict(plain.named_parameters())
        parts = {
            key: (local_values(param), local_values(sharded_like(whole[key].detach(), param)))
            for key, param in model.named_parameters()
        }
        errors.append(worst(largest_error(*pair) for pair in parts.values()))
    return errors


def all_optimizers():
    """By name: errors in float64; of bfloat16 weights that are rounded stochastically; of moments in 8 bits."""
    found = {name: errors_to_one_process(name, torch.float64, 5) for name in OPTIMIZERS}
    for name in ("AdamW", "Lamb", "Lion"):
        found[f"{name} stochastic"] = errors_to_one_process(name, torch.bfloat16, 3, rounding="stochastic", seed=3)
    return found


def bytes_of_state(name):
    """By the estimate, before anything is allocated, and of the tensors after a step."""
    model = shard(tied(torch.float32), device_mesh())
    optimizer = make(name, model)
    guess = estimate(optimizer)
    for key, param in model.named_parameters():
        param.grad = sharded_like(gradients(0, torch.float32)[key], param)
    optimizer.step()
    return guess.state, sum(storages(dict(optimizer.state)).values())


def eight_bits():
    return errors_to_one_process("AdamW", torch.float32, 3, moment_bits=8)


def trained(make_optimizer, hsdp):
    """Weights after real backward passes, and those of one process on all ranks' batches."""
    enable_cpu()
    rank, world = dist.get_rank(), dist.get_world_size()
    model, plain = shard(tied(), device_mesh(hsdp)), tied()
    ours, one = make_optimizer(model.parameters()), make_optimizer(plain.parameters())
    for step in range(5):
        loss_of(model, step * world + rank).backward()
        ours.step()
        ours.zero_grad()
        for batch in range(world):
            (loss_of(plain, step * world + batch) / world).backward()
        one.step()
        one.zero_grad()
    return largest_error(
        {name: param.full_tensor() for name, param in model.named_parameters()}, dict(plain.named_parameters())
    )


def sgd(params):
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)


def lamb(params):
    return Lamb(params, lr=0.01)


def real_training(hsdp):
    return {make_optimizer.__name__: trained(make_optimizer, hsdp) for make_optimizer in (sgd, lamb)}


def refusal(act):
    """The error that a call raises, with the number of collectives before it."""
    with CollectiveCounter() as counter:
        try:
            act()
        except ValueError as error:
            return str(error), counter.total
    return None, counter.total


def made_too_early():
    """Refusals of optimizers of parameters that are no longer the model's, and none of those that are."""
    enable_cpu()
    found = {}
    model = tied()
    early = Lamb(model.parameters())
    shard(model, device_mesh())
    loss_of(model, 0).backward()
    found["before fully_shard"] = refusal(early.step)
    found["again"] = refusal(early.step)
    model = shard(tied(), device_mesh())
    with torch.no_grad():
        loss_of(model, 0)
    late = AdamW(model.parameters())
    loss_of(model, 0).backward()
    found["of an unsharded root"] = refusal(late.step)
    for param in model.parameters():
        param.grad = None
    frozen = list(nn.Linear(3, 3).parameters())
    good = SGD([*model.parameters(), *frozen], lr=0.1)
    found["of the sharded model, with others"] = refusal(good.step)
    return found


def kinds_of_gradients():
    """Weights after gradients of other placements, and refusals of those that are no DTensor of the mesh."""
    line, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    whole, grad = torch.arange(15.0).double().view(5, 3), torch.arange(15.0).double().view(5, 3).cos()
    for name, placement, given in (
        ("partial for copies", Replicate(), Partial()),
        ("partial for rows", Shard(0), Partial()),
        ("copies for rows", Shard(0), Replicate()),
    ):
        param = nn.Parameter(distribute_tensor(whole.clone(), line, [placement]))
        share = grad / (line.size() if given.is_partial() else 1)
        param.grad = DTensor.from_local(share, line, [given], run_check=False)
        SGD([param], lr=1.0).step()
        found[name] = largest_error(param.full_tensor(), whole - grad)
    param = nn.Parameter(distribute_tensor(whole, line, [Replicate()]))
    optimizer = SGD([param], lr=1.0)
    param.grad = grad
    found["plain"] = refusal(optimizer.step)
    return found


def kinds_of_parameters():
    """Plain tensors and DTensors in one optimizer, groups that grow, flat data with a layout; bytes of state."""
    line, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    whole = torch.arange(1.0, 16.0).double().view(5, 3)
    sharded = nn.Parameter(distribute_tensor(whole, line, [Shard(0)]))
    plain, later = nn.Parameter(whole.clone()), nn.Parameter(distribute_tensor(whole, line, [Shard(0)]))
    optimizer = Lamb([plain], lr=0.1)
    optimizer.add_param_group({"params": [sharded]})
    optimizer.extend_group(0, [later])
    layout = layout_of(sharded, axes := MeshAxes())
    flat = nn.Parameter(local_values(sharded).flatten().clone())
    bound = Lamb([flat], lr=0.1)
    bound.bind({flat: layout}, axes.mesh())
    for _ in range(2):
        plain.grad = whole.cos()
        sharded.grad = later.grad = distribute_tensor(whole.cos(), line, [Shard(0)])
        flat.grad = local_values(sharded.grad).flatten()
        optimizer.step()
        bound.step()
    found["errors"] = [
        largest_error(sharded.full_tensor(), plain),
        largest_error(later.full_tensor(), plain),
        largest_error(flat, local_values(sharded).flatten()),
    ]
    found["bytes"] = sum(storages([optimizer.state[sharded]]).values()), 2 * layout.max_local * 8
    return found


def on_four_ranks():
    return real_training(hsdp=True)


def on_three_ranks():
    """All cases, of one start."""
    return {
        "optimizers": all_optimizers(),
        "training": real_training(hsdp=False),
        "early": made_too_early(),
        "gradients": kinds_of_gradients(),
        "parameters": kinds_of_parameters(),
        "bytes": {name: bytes_of_state(name) for name in OPTIMIZERS},
    }
