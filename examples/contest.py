"""What the ranks of benchmark_optimizers.py run: the inner steps of several optimizers on the same shards, in turn."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.booster import plugin as stock
from colossalai.nn.optimizer import DistributedAdaFactor, DistributedCAME, DistributedLamb
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_bcd import CAME, Adafactor, AdamW, Lamb
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh
from colossal_bcd.testing import CollectiveCounter

HYBRID = {"tp_size": 2, "pp_size": 1, "max_norm": 0.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to divide the model."""

    num_ranks: int
    ours: type[Any]
    theirs: type[Any]
    options: Mapping[str, Any]


CASES = {
    "zero2": Case(
        num_ranks=2,
        ours=LowLevelZeroPlugin,
        theirs=stock.LowLevelZeroPlugin,
        options={"stage": 2, "precision": "bf16"},
    ),
    # In fp32: of bf16 weights without ZeRO, ColossalAI takes every shard for a whole matrix, and sends nothing.
    "tp2": Case(
        num_ranks=2,
        ours=HybridParallelPlugin,
        theirs=stock.HybridParallelPlugin,
        options={**HYBRID, "zero_stage": 0, "precision": "fp32"},
    ),
    "tp2+zero2": Case(
        num_ranks=4,
        ours=HybridParallelPlugin,
        theirs=stock.HybridParallelPlugin,
        options={**HYBRID, "zero_stage": 2, "precision": "bf16"},
    ),
}

OPTIMIZERS: Mapping[str, tuple[type[ShardedOptimizer], type[Optimizer], Mapping[str, Any]]] = {
    "adafactor": (Adafactor, DistributedAdaFactor, {}),
    "came": (CAME, DistributedCAME, {"lr": 1e-3}),
    "lamb": (Lamb, DistributedLamb, {"lr": 1e-3}),
    # ColossalAI has no distributed AdamW: torch's runs on the shards.
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 1e-3}),
}
"""Ours, theirs and the hyper-parameters that both get."""

GRADIENTS = 3
"""Different gradients that the steps go through."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of the Llama."""

    hidden: int = 256
    layers: int = 8

    def build(self) -> nn.Module:
        """The same weights on every rank and in every call."""
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=1024,
            use_cache=False,
            attn_implementation="eager",
        )
        return LlamaForCausalLM(config)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contestant's steps."""

    milliseconds: tuple[float, ...]
    """Of every step the time of the slowest rank."""
    collectives: int
    """Per step, on rank 0."""


def contest(case: str, optimizer: str, steps: int, warm_up: int, shape: Shape, with_theirs: bool) -> dict[str, Result]:
    """Run the inner steps of all contestants in turn, on this rank.

    Returns:
        "ours", "theirs", "alone" (ours without another rank to ask) and "AdamW" (torch's), each on its own copy of
        the same shards with the same gradients.
    """
    warnings.filterwarnings("ignore")
    setup = CASES[case]
    our_class, their_class, hyper = OPTIMIZERS[optimizer]
    # A plugin destroys its process groups when it is collected.
    plugins: list[Any] = [setup.ours(**setup.options), setup.theirs(**setup.options)]
    params, ours, layouts = _boost_ours(plugins[0], our_class, hyper, shape)
    contestants: dict[str, tuple[list[Tensor], Optimizer]] = {"ours": (params, ours)}
    if with_theirs:
        theirs = _boost_theirs(plugins[1], their_class, hyper, shape)
        contestants["theirs"] = [param for group in theirs.param_groups for param in group["params"]], theirs
    alone, copies = _on_copies(our_class, params, hyper)
    assert isinstance(alone, ShardedOptimizer)
    alone.bind(dict(zip(copies, layouts, strict=True)), Mesh({"tp": (), "zero": ()}))
    contestants["alone"] = copies, alone
    yardstick, copies = _on_copies(torch.optim.AdamW, params, {})
    contestants["AdamW"] = copies, yardstick
    gradients = [_gradients(layouts, number) for number in range(GRADIENTS)]
    return _take_turns(contestants, gradients, steps, warm_up)


def _take_turns(
    contestants: Mapping[str, tuple[list[Tensor], Optimizer]],
    gradients: list[list[Tensor]],
    steps: int,
    warm_up: int,
) -> dict[str, Result]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    collectives = {}
    for step in range(warm_up + steps):
        for name, (params, optimizer) in contestants.items():
            for param, grad in zip(params, gradients[step % len(gradients)], strict=True):
                param.grad = grad.clone()
            if step == 0:
                with CollectiveCounter() as counter:
                    optimizer.step()
                collectives[name] = counter.total
                continue
            seconds = _seconds(optimizer.step)
            if step >= warm_up:
                times[name].append(seconds)
    slowest = torch.tensor(list(times.values()), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {
        name: Result(milliseconds=tuple(1000 * seconds for seconds in row), collectives=collectives[name])
        for name, row in zip(times, slowest.tolist(), strict=True)
    }


def _seconds(step: Callable[[], Any]) -> float:
    """Duration of a step that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _boost_ours(
    plugin: Any, cls: type[Optimizer], hyper: Mapping[str, Any], shape: Shape
) -> tuple[list[Tensor], Optimizer, list[Layout]]:
    """Masters and inner optimizer under our plugin, and the masters' layouts."""
    model = shape.build()
    _, engine, *_ = Booster(plugin=plugin).boost(model, cls(list(model.parameters()), **hyper))
    params = [param for group in engine.optim.param_groups for param in group["params"]]
    layouts = {master: engine.masters.layout(param) for param, master in engine.masters.of.items()}
    return params, engine.optim, [layouts[param] for param in params]


def _boost_theirs(plugin: Any, cls: type[Optimizer], hyper: Mapping[str, Any], shape: Shape) -> Optimizer:
    """The inner optimizer under ColossalAI's own plugin."""
    # The check refuses a CPU; everything else of an inner step runs there.
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
    model = shape.build()
    _, engine, *_ = Booster(plugin=plugin).boost(model, cls(list(model.parameters()), **hyper))
    return engine.optim


def _on_copies(
    cls: type[Optimizer], params: Sequence[Tensor], hyper: Mapping[str, Any]
) -> tuple[Optimizer, list[Tensor]]:
    copies: list[Tensor] = [nn.Parameter(param.detach().clone()) for param in params]
    return cls(copies, **hyper), copies


def _gradients(layouts: list[Layout], number: int) -> list[Tensor]:
    """This rank's parts of one set of gradients that are the same for all contestants."""
    generator = torch.Generator().manual_seed(number)
    return [layout.shard(torch.randn(layout.shape, generator=generator)) for layout in layouts]
