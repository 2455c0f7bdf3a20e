"""What ranks run in test_setup_distributed.py: ColossalAI's distributed optimizers on weights divided by hand."""

from __future__ import annotations

import copy
from typing import Any

import references
import torch
import torch.distributed as dist
from colossalai.cluster import ProcessGroupMesh
from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row, VocabParallelEmbedding1D
from colossalai.tensor.d_tensor.api import clear_layout_converter
from on_ranks import message_of
from torch import Tensor, nn

from colossal_bcd import compat
from colossal_bcd.booster import LowLevelZeroOptimizer, install
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.layouts import global_shape, shard_layout

STEPS = 5
LR = 1e-2
PROJECTION = {"rank": 2, "update_proj_gap": 2, "scale": 0.5, "proj_type": "std"}


class Whole(nn.Module):
    """Odd sizes beside those that tensor parallelism divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def divided(model: Whole, tp_group: Any) -> nn.Module:
    """The same model with its first layer divided by rows and its second one by columns."""
    clear_layout_converter()
    parts = copy.deepcopy(model)
    parts.up = Linear1D_Col.from_native_module(parts.up, process_group=tp_group, gather_output=False)
    parts.down = Linear1D_Row.from_native_module(parts.down, process_group=tp_group, parallel_input=True)
    return parts


def groups_of(model: nn.Module, name: str) -> list[dict[str, Any]]:
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    projection = PROJECTION if name == "galore" else {}
    return [{"params": matrices, "weight_decay": 0.1, **projection}, {"params": vectors, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "lamb": (compat.DistributedLamb, {"lr": LR}, references.lamb, {"bias_correction": "step_size"}),
    "lamb-plain": (
        compat.DistributedLamb,
        {"lr": LR, "bias_correction": False},
        references.lamb,
        {"bias_correction": False},
    ),
    "adafactor": (
        compat.DistributedAdaFactor,
        {"lr": LR, "relative_step": False},
        references.adafactor,
        {"relative_step": False},
    ),
    "came": (compat.DistributedCAME, {"lr": LR}, references.came, {}),
}
"""Constructor, its options, the textbook, and its."""


def check(name: str, tp_size: int, zero_size: int, wrapper: str) -> float:
    """Largest error of a weight after some steps against the textbook on whole float64 weights, by its bound."""
    make, options, rule, hyper = OPTIMIZERS[name]
    mesh = ProcessGroupMesh(tp_size, zero_size)
    tp_group, dp_group = mesh.get_group_along_axis(0), mesh.get_group_along_axis(1)
    whole = Whole()
    model = divided(whole, tp_group)
    weights = dict(model.named_parameters())
    full = {key: param.detach().double() for key, param in whole.named_parameters()}
    decay = {key: 0.1 if value.dim() > 1 else 0.0 for key, value in full.items()}
    states: dict[str, dict[str, Any]] = {key: {} for key in full}
    layouts = {
        key: shard_layout(
            param, global_shape(param, tuple(param.shape), 0), dist.get_rank(tp_group), dist.get_world_size(tp_group)
        )
        for key, param in weights.items()
    }
    optimizer: Any = make(groups_of(model, name), **options)
    engine: Any = optimizer
    if wrapper == "hand":
        optimizer.setup_distributed(tp_group, dp_group, {id(param): param for param in weights.values()})
    elif wrapper == "ours":
        engine = LowLevelZeroOptimizer(optimizer, partition_grad=True, dp_process_group=dp_group)
        to_weight = engine.get_master_to_working_map()
        engine.optim.setup_distributed(tp_group, dp_group, to_weight, engine.get_param_padding_map(), is_zero=True)
    else:
        from colossalai.zero import LowLevelZeroOptimizer as StockLowLevelZeroOptimizer

        install()
        engine = StockLowLevelZeroOptimizer(optimizer, partition_grad=True, dp_process_group=dp_group)
        to_weight = engine.get_master_to_working_map()
        optimizer.setup_distributed(tp_group, dp_group, to_weight, engine.get_param_padding_map(), is_zero=True)
    largest_step = 0.0
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        given = {key: torch.randn(value.shape, generator=generator, dtype=torch.float64) for key, value in full.items()}
        shards = {key: layouts[key].shard(grad).float() for key, grad in given.items()}
        if wrapper == "hand":
            for key, param in weights.items():
                param.grad = shards[key].clone()
        else:
            engine.backward(sum((param * shards[key]).sum() for key, param in weights.items()))
        engine.step()
        engine.zero_grad()
        for key, weight in full.items():
            full[key] = rule(weight, given[key], states[key], lr=LR, weight_decay=decay[key], **hyper)
            largest_step = max(largest_step, (full[key] - weight).abs().max().item())
    errors = [
        (param.detach().double() - layouts[key].shard(full[key])).abs().max().reshape(1)
        for key, param in weights.items()
    ]
    largest = max(value.abs().max().item() for value in full.values())
    # One rounding of the weight and fewer than 16, relative to the largest step, of its update in each step.
    return (torch.cat(errors).max() / (STEPS * 2**-24 * (largest + 16 * largest_step))).item()


def galore(tp_size: int) -> float:
    """GaLore with 8-bit storage off, against GaLore on whole weights, by float32's bound."""
    mesh = ProcessGroupMesh(tp_size, dist.get_world_size() // tp_size)
    tp_group = mesh.get_group_along_axis(0)
    whole = Whole()
    model = divided(whole, tp_group)
    options = {"lr": LR, "min_8bit_size": 10**10}
    parts = compat.DistGaloreAwamW(groups_of(model, "galore"), **options)
    parts.setup_distributed(tp_group)
    reference = compat.DistGaloreAwamW(groups_of(whole, "galore"), **options)
    place = dist.get_rank(tp_group), dist.get_world_size(tp_group)
    errors, before = [], whole.down.weight.detach().clone()
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for one, part in zip(whole.parameters(), model.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            part.grad = shard_layout(part, tuple(one.shape), *place).shard(one.grad).clone()
        parts.step()
        reference.step()
    assert not torch.equal(whole.down.weight, before)
    for one, part in zip(whole.parameters(), model.parameters(), strict=True):
        errors.append((shard_layout(part, tuple(one.shape), *place).shard(one.detach()) - part.detach()).abs().max())
    return torch.stack(errors).max().item()


def padded() -> tuple[int, ...]:
    """A vocabulary of 10 that is padded to 16 over two ranks: what the embedding stands for is 10 rows."""
    clear_layout_converter()
    embedding = VocabParallelEmbedding1D.from_native_module(
        nn.Embedding(10, 4), process_group=dist.group.WORLD, make_vocab_size_divisible_by=8
    )
    optimizer = compat.DistributedLamb(embedding.parameters(), lr=LR)
    optimizer.setup_distributed(dist.group.WORLD)
    (layout,) = optimizer.layouts.values()
    return (*layout.shape, layout.split.padded, embedding.weight.shape[0])


def forgotten() -> str:
    """The error of a step on shards of which nobody has spoken."""
    model = divided(Whole(), dist.group.WORLD)
    optimizer = compat.DistributedLamb(model.parameters(), lr=LR)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return message_of(lambda: optimizer.step())


def without_group() -> str:
    """The error of `setup_distributed` without the ranks that divide a weight."""
    model = divided(Whole(), dist.group.WORLD)
    optimizer = compat.DistributedCAME(model.parameters(), lr=LR)
    return message_of(lambda: optimizer.setup_distributed())


def on_mesh(tp_size: int, zero_size: int) -> dict[str, Any]:
    """Errors by optimizer and by who keeps the masters."""
    install_cpu_accelerator()
    seen: dict[str, Any] = {}
    wrappers = ("hand",) if zero_size == 1 else ("ours", "stock")
    for name in OPTIMIZERS:
        for wrapper in wrappers:
            seen[f"{name} {wrapper}"] = check(name, tp_size, zero_size, wrapper)
    if zero_size == 1:
        seen["galore"] = galore(tp_size)
        seen["padded"], seen["forgotten"], seen["without_group"] = padded(), forgotten(), without_group()
    return seen
