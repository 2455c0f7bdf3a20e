"""What ranks run in test_relora_plugins.py: the ReLoRA form under data parallelism, in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster import Booster
from on_ranks import equal_on_ranks, message_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from colossal_bcd import AdamW
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossal_bcd.compat import ReLoRaModel
from colossal_bcd.testing import CollectiveCounter
from support.errors import largest_error

GAP, STEPS, WORLD = 3, 10, 6


class Net(nn.Module):
    """Sizes that no number of ranks divides; one layer that a batch may leave out."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        deep = [nn.Linear(7, 7) for _ in range(depth - 1)]
        self.attn = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7, bias=False), *deep, nn.Tanh())
        self.mlp = nn.Linear(7, 3)
        self.extra = nn.Linear(7, 3)

    def forward(self, x: Tensor, use_extra: bool = False) -> Tensor:
        hidden = self.attn(x)
        return self.mlp(hidden) + self.extra(hidden) if use_extra else self.mlp(hidden)


def data(step: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randn(4, 7, generator=generator).double(), torch.randn(4, 3, generator=generator).double()


def loss_of(model: nn.Module, step: int, part: int) -> Tensor:
    """The loss of one of `WORLD` parts of a batch; only part 0 of later steps uses the layer `extra`."""
    x, y = data(step, part)
    return (model(x, use_extra=part == 0 and step >= GAP) - y).square().mean()


def mean_loss(model: nn.Module, step: int, parts: list[int], ddp: bool) -> Tensor:
    """Over some parts; torch's DDP allows one pass and layers that every batch uses."""
    if not ddp:
        return sum(loss_of(model, step, part) for part in parts) / len(parts)
    x, y = map(torch.cat, zip(*(data(step, part) for part in parts), strict=True))
    return (model(x, use_extra=True) - y).square().mean()


def wrapped(depth: int = 1) -> ReLoRaModel:
    return ReLoRaModel(
        Net(depth).double(), r=2, scale=0.7, lora_dropout=0, target_modules=["attn", "mlp", "extra"], seed=5
    )


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    return {"adamw": AdamW, "torch-adamw": torch.optim.AdamW}[kind](model.parameters(), lr=1e-2, weight_decay=0.1)


def run(
    model: Any, inner: ReLoRaModel, optimizer: Any, backward: Any, parts: list[int], random_from: int, ddp: bool
) -> None:
    for step in range(STEPS):
        inner._config.forward_type = step % GAP == 0
        backward(mean_loss(model, step, parts, ddp))
        if step % GAP == 0:
            inner.merge_and_reinit(optimizer, step >= random_from)
        optimizer.step()
        optimizer.zero_grad()


def result(inner: ReLoRaModel) -> dict[str, Tensor]:
    """Weights, bases and factors."""
    return {name: value.detach().clone() for name, value in inner.state_dict().items()}


def alone(kind: str, random_from: int, ddp: bool) -> dict[str, Tensor]:
    model = wrapped()
    run(model, model, optimizer_of(kind, model), torch.Tensor.backward, list(range(WORLD)), random_from, ddp)
    return result(model)


PLUGINS = {
    "zero1": lambda: LowLevelZeroPlugin(stage=1, precision="fp32", overlap_communication=False),
    "zero1-overlap": lambda: LowLevelZeroPlugin(stage=1, precision="fp32", overlap_allgather=True),
    "zero2": lambda: LowLevelZeroPlugin(stage=2, precision="fp32"),
    "ddp": TorchDDPPlugin,
}


def distributed(plugin: str, kind: str, random_from: int) -> dict[str, Any]:
    """Largest difference from one process, whether ranks are equal, and values of state on this rank."""
    size, rank = dist.get_world_size(), dist.get_rank()
    share = WORLD // size
    parts = list(range(rank * share, (rank + 1) * share))
    inner, ddp = wrapped(), plugin in ("ddp", "torch")
    if rank:
        with torch.no_grad():  # boosting copies the first rank's weights
            for param in inner.parameters():
                param.add_(1.0)
    optimizer = optimizer_of(kind, inner)
    if plugin == "torch":
        model: Any = DistributedDataParallel(inner, find_unused_parameters=False)
        run(model, inner, optimizer, torch.Tensor.backward, parts, random_from, ddp)
        states = optimizer.state
    else:
        booster = Booster(plugin=PLUGINS[plugin]())
        model, engine, *_ = booster.boost(inner, optimizer)
        run(model, inner, engine, lambda loss: booster.backward(loss, engine), parts, random_from, ddp)
        states = engine.optim.state
        if plugin == "zero1-overlap":
            engine._force_wait_all_gather()  # the last step's weights arrive when they are used
    got, want = result(inner), alone(kind, random_from, ddp)
    held = sum(value.numel() for state in states.values() for value in state.values() if isinstance(value, Tensor))
    return {
        "error": largest_error({name: got[name] for name in want}, want),
        "equal": equal_on_ranks(got.values()),
        "held": held,
        "same_names": set(got) == set(want),
    }


def collectives(depth: int) -> dict[str, int]:
    """Calls within `merge_and_reinit` of a model of some depth."""
    inner = wrapped(depth)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="fp32"))
    model, engine, *_ = booster.boost(inner, optimizer_of("adamw", inner))
    calls = {}
    for step in range(2):
        inner._config.forward_type = True
        booster.backward(loss_of(model, step, dist.get_rank()), engine)
        with CollectiveCounter() as counter:
            inner.merge_and_reinit(engine)
        calls = dict(counter.calls)
        engine.step()
        engine.zero_grad()
    return calls


def without_full_gradient() -> str:
    """The error of a refresh that no pass prepared, the same on every rank."""
    inner = wrapped()
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="fp32"))
    model, engine, *_ = booster.boost(inner, optimizer_of("adamw", inner))
    booster.backward(loss_of(model, 0, dist.get_rank()), engine)
    before = result(inner)
    try:
        inner.merge_and_reinit(engine)
    except ValueError as error:
        assert all(torch.equal(before[name], value) for name, value in result(inner).items())
        return str(error)
    return ""


def low_precision(precision: str) -> dict[str, Any]:
    """Whether ranks stay equal and the loss falls, under bf16 or fp16 with loss scaling."""
    inner = wrapped()
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision=precision, initial_scale=2**20))
    model, engine, *_ = booster.boost(inner, AdamW(inner.parameters(), lr=2e-2))
    losses = []
    for step in range(40):
        inner._config.forward_type = step % 10 == 0
        x = torch.randn(16, 7, generator=torch.Generator().manual_seed(dist.get_rank()))
        loss = (model(x).float() - x[:, :3].sin()).square().mean()
        booster.backward(loss, engine)
        if inner._config.forward_type:
            inner.merge_and_reinit(engine, step >= 20)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    equal = equal_on_ranks(result(inner).values())
    return {"equal": equal, "first": losses[0], "last": losses[-1], "dtype": inner.layers()[0][1].weight.dtype}


def tensor_parallel() -> str:
    """The error of boosting what ShardFormer would divide."""
    inner = wrapped()
    booster = Booster(plugin=HybridParallelPlugin(tp_size=2, pp_size=1, precision="fp32"))
    return message_of(lambda: booster.boost(inner, optimizer_of("adamw", inner)))
