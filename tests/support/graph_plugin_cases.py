"""What ranks run in test_graph_plugins.py: checkpointed and compiled models under the real plugins."""

from __future__ import annotations

from typing import Any

import graph_cases
import torch
import torch._dynamo
from colossalai.booster import Booster
from torch import Tensor

from colossal_bcd import AdamW
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin

PLUGINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "zero1": (LowLevelZeroPlugin, {"stage": 1, "precision": "fp32"}),
    "zero2": (LowLevelZeroPlugin, {"stage": 2, "precision": "fp32"}),
    "hybrid": (HybridParallelPlugin, {"tp_size": 1, "pp_size": 1, "zero_stage": 2, "precision": "bf16"}),
    "ddp": (TorchDDPPlugin, {}),
}


def trained(plugin: str, optimizer: str, way: str, how: str, steps: int, backend: str = "aot_eager") -> list[Tensor]:
    """Weights of this rank after training on batches of its own."""
    cls, options = PLUGINS[plugin]
    model, made = graph_cases.prepared(optimizer, way)
    given = graph_cases.compiled_before(how, model, backend)
    booster = Booster(plugin=cls(**options))
    boosted, engine, *_ = booster.boost(given, made)
    graph_cases.enable_after(way, model)
    runs = graph_cases.compiled_after(how, boosted, backend)
    rank = torch.distributed.get_rank()
    for step in range(steps):
        loss = graph_cases.loss(runs, step, rank)
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
    return graph_cases.weights(model)


def equal(runs: list[tuple[str, str, str, str]], steps: int) -> dict[str, Any]:
    """Of each (plugin, optimizer, way, how): whether the weights are those without checkpointing and compilation."""
    plain: dict[tuple[str, str, bool], list[Tensor]] = {}
    results: dict[str, Any] = {}
    for plugin, optimizer, way, how in runs:
        llama = way.startswith("hf")
        key = plugin, optimizer, llama
        if key not in plain:
            plain[key] = trained(plugin, optimizer, "hf" if llama else "none", "", steps)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        name = "-".join((plugin, optimizer, way, how))
        try:
            got = trained(plugin, optimizer, way, how, steps)
        except Exception as error:
            results[name] = repr(error)[:300]
            continue
        results[name] = all(map(torch.equal, got, plain[key])), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return results


def thawed(how: str, first: int, steps: int = 6) -> list[Tensor]:
    """Weights after a layer that was frozen at boosting was thawed before step `first`."""
    torch._dynamo.reset()
    model = graph_cases.net("none")
    model.layers[1].requires_grad_(False)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=1, precision="fp32"))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    boosted, engine, *_ = booster.boost(graph_cases.compiled_before(how, model, "aot_eager"), optimizer)
    for step in range(steps):
        if step == first:
            model.layers[1].requires_grad_(True)
        booster.backward(graph_cases.loss(boosted, step, torch.distributed.get_rank()), engine)
        engine.step()
        engine.zero_grad()
    return graph_cases.weights(model)


def thawed_compiled() -> tuple[bool, bool]:
    """Whether a compiled model trains a thawed layer as one that is not compiled and thaws a step later."""
    compiled, later, never = thawed("before", 2), thawed("", 3), thawed("", 6)
    return all(map(torch.equal, compiled, later)), all(map(torch.equal, compiled, never))
