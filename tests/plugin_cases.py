"""What ranks run in test_plugins.py: one optimizer under one real plugin, with gradients given instead of computed."""

from __future__ import annotations

import zlib
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from torch import Tensor, nn

import colossal_bcd
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin
from colossal_bcd.testing import CollectiveCounter

STEPS = 6
LR = 1e-2


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


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor | None:
    """Full gradient by name and step, the same for all ranks; one norm weight has none at step 2.

    Small multiples of 3/32: the low-precision average over 1 to 4 ranks is exact, so that only the step is measured.
    """
    if name.endswith("0.input_layernorm.weight") and step == 2:
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{step}".encode()))
    return torch.randint(-40, 41, shape, generator=generator) * (3 / 32)


def build(kind: str, vocab: int) -> nn.Module:
    return models.gpt2(vocab) if kind == "gpt2" else models.llama(vocab)


def plugin_of(options: dict[str, Any]) -> Any:
    options = dict(options)
    if options.pop("plugin") == "zero":
        return LowLevelZeroPlugin(precision="bf16", **options)
    return HybridParallelPlugin(pp_size=1, precision="bf16", **options)


def injected(optimizer: str, kind: str, vocab: int, options: dict[str, Any]) -> dict[str, Any]:
    """Masters after `STEPS` steps on given gradients, against the float64 reference; collectives of the inner step."""
    import references

    model = build(kind, vocab)
    names = {id(param): name for name, param in model.named_parameters()}
    full = {name: param.detach().bfloat16().double() for name, param in model.named_parameters()}
    ours = getattr(colossal_bcd, optimizer)(groups(model))
    decay = {names[id(param)]: group["weight_decay"] for group in ours.param_groups for param in group["params"]}
    scheduler = torch.optim.lr_scheduler.LambdaLR(ours, factor)
    booster = Booster(plugin=plugin_of(options))
    model, engine, *_ = booster.boost(model, ours)
    step_one = references.STEPS[optimizer]
    states: dict[str, dict[str, Any]] = {name: {} for name in full}
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
                step_one(weight, grad.double(), states[name], lr=lr, weight_decay=decay[name])
        scheduler.step()
    worst = 0.0
    for param in engine.layouts:
        layout, master = engine.masters.layout(param), engine.masters.of[param]
        data = layout.num_local
        want = layout.shard(full[names[id(param)]]).view(-1)[:data]
        worst = max([worst, *(master.view(-1)[:data].double() - want).abs().tolist()])
        working = engine.layouts[param]
        shard = working.shard(full[names[id(param)]]).view(-1)[: working.num_local]
        close = torch.allclose(param.detach().view(-1)[: working.num_local].double(), shard, rtol=2**-7, atol=1e-5)
        assert close, f"working weight {names[id(param)]} differs from its master"
    return {"error": worst, "calls": dict(counter.calls), "replicas": _replicas_equal(engine)}


def _replicas_equal(engine: Any) -> bool:
    """Whether parameters without a tensor-parallel split are bitwise equal on all ranks."""
    for param, layout in engine.layouts.items():
        if layout.split is None:
            largest = param.detach().float().clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            if not torch.equal(largest, param.detach().float()):
                return False
    return True
