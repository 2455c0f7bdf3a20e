"""What ranks run in test_plugins.py: one optimizer under one real plugin, with gradients given instead of computed."""

from __future__ import annotations

import functools
from typing import Any

import models
import on_ranks
import references
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from on_ranks import equal_on_ranks
from torch import Tensor, nn

import colossal_bcd
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin
from colossal_bcd.testing import CollectiveCounter
from support.errors import largest_error

STEPS = 5
LR = 1e-2
HYPER: dict[str, dict[str, Any]] = {"Adafactor": {"lr": LR, "relative_step": False}, "CAME": {"lr": LR}}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not and have half the step size."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "lr": LR, "weight_decay": 0.1},
        {"params": vectors, "lr": LR / 2, "weight_decay": 0.0},
    ]


def factor(step: int) -> float:
    return 1.0 / (1 + step)


@functools.cache
def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor | None:
    """As of `on_ranks`, but one norm weight has none at step 2."""
    no_gradient = name.endswith("0.input_layernorm.weight") and step == 2
    return None if no_gradient else on_ranks.gradient(name, shape, step)


def build(kind: str, vocab: int) -> nn.Module:
    return models.gpt2(vocab) if kind == "gpt2" else models.llama(vocab)


def plugin_of(options: dict[str, Any]) -> Any:
    options = dict(options)
    if options.pop("plugin") == "zero":
        return LowLevelZeroPlugin(precision="bf16", **options)
    return HybridParallelPlugin(pp_size=1, precision="bf16", **options)


def injected(optimizer: str, kind: str, vocab: int, options: dict[str, Any]) -> dict[str, Any]:
    """Masters after `STEPS` steps on given gradients, against the float64 reference; collectives of the inner step."""
    model = build(kind, vocab)
    names = {id(param): name for name, param in model.named_parameters()}
    full = {name: param.detach().bfloat16().double() for name, param in model.named_parameters()}
    hyper = HYPER.get(optimizer, {})
    ours = getattr(colossal_bcd, optimizer)(groups(model), **hyper)
    decay = {names[id(param)]: group["weight_decay"] for group in ours.param_groups for param in group["params"]}
    scheduler = torch.optim.lr_scheduler.LambdaLR(ours, factor)
    booster = Booster(plugin=plugin_of(options))
    model, engine, *_ = booster.boost(model, ours)
    reference = getattr(references, optimizer.lower())
    states: dict[str, dict[str, Any]] = {name: {} for name in full}
    largest_step = 0.0
    for step in range(STEPS):
        for param in engine.layouts:
            grad = gradient(names[id(param)], engine.layouts[param].shape, step)
            param.grad = None if grad is None else engine.layouts[param].shard(grad).to(param.dtype)
        engine.sync_dp_grads()
        engine.load_gradients()
        with CollectiveCounter() as counter:
            engine.optim.step()
        engine.write_back()
        engine.zero_grad()
        for name, weight in full.items():
            grad = gradient(name, tuple(weight.shape), step)
            if grad is not None:
                lr = LR * (1.0 if weight.dim() > 1 else 0.5) * factor(step)
                numbers = {**hyper, "lr": lr, "weight_decay": decay[name]}
                full[name] = reference(weight, grad.double(), states[name], **numbers)
                largest_step = max(largest_step, (full[name] - weight).abs().max().item())
        scheduler.step()
    worst = 0.0
    for param in engine.layouts:
        layout, master = engine.masters.layout(param), engine.masters.of[param]
        data = layout.num_local
        want = layout.shard(full[names[id(param)]]).view(-1)[:data]
        worst = max(worst, largest_error(master.view(-1)[:data], want))
        working = engine.layouts[param]
        shard = working.shard(full[names[id(param)]]).view(-1)[: working.num_local]
        close = torch.allclose(param.detach().view(-1)[: working.num_local].double(), shard, rtol=2**-7, atol=1e-5)
        assert close, f"working weight {names[id(param)]} differs from its master"
    largest = max(weight.abs().max().item() for weight in full.values())
    return {
        "error": worst,
        "bound": bound_of(largest, largest_step),
        "calls": dict(counter.calls),
        "replicas": equal_on_ranks(param for param, layout in engine.layouts.items() if layout.split is None),
    }


def injected_each(optimizers: tuple[str, ...], kind: str, vocab: int, options: dict[str, Any]) -> dict[str, Any]:
    """`injected` of several optimizers."""
    return {optimizer: injected(optimizer, kind, vocab, options) for optimizer in optimizers}


def bound_of(largest: float, largest_step: float) -> float:
    """Largest error of a weight after `STEPS` steps in float32.

    Each step rounds the weight once and its update a few times, less than 16 relative to the largest step: sums over
    rows and columns lose a few bits, of which the root takes half.
    """
    return STEPS * 2**-24 * (largest + 16 * largest_step)


class Branches(nn.Module):
    """Three layers of which a batch may use any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 3) for _ in range(3))
        for param in self.parameters():
            nn.init.zeros_(param)

    def forward(self, x: Tensor, use: tuple[str, ...]) -> Tensor:
        return sum(getattr(self, name)(x).sum() for name in use)


def missing_on_one_rank(stage: int) -> dict[str, bool]:
    """Rank 0 uses `first` and `second`, rank 1 only `second`, none uses `third`."""
    model = Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=stage, precision="fp32"))
    model, engine, *_ = booster.boost(model, optimizer)
    use = ("first", "second") if dist.get_rank() == 0 else ("second",)
    booster.backward(model(torch.ones(1, 5), use=use), engine)
    engine.step()
    after = {name: param.detach() for name, param in model.module.named_parameters()}
    return {
        "half": all(
            (after[f"first.{p}"] == -0.5).all() and (after[f"second.{p}"] == -1).all() for p in ("weight", "bias")
        ),
        "untouched": bool((after["third.weight"] == 0).all()),
    }


def different_start() -> bool:
    """Without ZeRO the ranks begin with the first one's weights, as under torch's DDP."""
    model = models.llama(seed=dist.get_rank())
    want = [param.detach().clone() for param in models.llama(seed=0).parameters()]
    plugin = HybridParallelPlugin(tp_size=1, pp_size=1, zero_stage=0, precision="fp32")
    model, *_ = Booster(plugin=plugin).boost(model, colossal_bcd.AdamW(model.parameters()))
    return all(torch.equal(a, b) for a, b in zip(model.module.parameters(), want, strict=True))


def scheduler_after_boosting() -> list[float]:
    """A scheduler made on the boosted optimizer itself."""
    model = models.llama()
    booster = Booster(plugin=LowLevelZeroPlugin(stage=1, precision="bf16"))
    model, engine, *_ = booster.boost(model, colossal_bcd.Lamb(groups(model)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(engine, lambda step: 1.0)
    for _ in range(2):
        booster.backward(model(input_ids=models.tokens(0), labels=models.tokens(0)).loss, engine)
        engine.step()
        scheduler.step()
    return [group["lr"] for group in engine.optim.param_groups]
