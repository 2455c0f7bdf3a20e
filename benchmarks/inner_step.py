"""Time the inner optimizer step against ColossalAI's, both in one process group.

    python benchmarks/inner_step.py                                   # all of it: one markdown table
    python benchmarks/inner_step.py --case zero2 --optimizer came --steps 50

It starts its own ranks; no GPU is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import click
import torch
from colossalai.booster import Booster
from colossalai.booster import plugin as stock
from colossalai.nn.optimizer import DistributedAdaFactor, DistributedCAME, DistributedLamb
from colossalai.zero.low_level import LowLevelZeroOptimizer
from common import environment, heading, llama, row, seconds, slowest
from torch import Tensor, nn
from torch.optim import Optimizer

from colossal_bcd import CAME, Adafactor, AdamW, Lamb
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh
from colossal_bcd.testing import CollectiveCounter, RankError, run_ranks

HEADER = (
    "optimizer", "mesh", "ranks", "theirs / ours", "ours / alone", "ours, ms", "theirs, ms", "alone, ms",
    "torch AdamW, ms", "collectives, ours", "theirs",
)  # fmt: skip


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

OPTIMIZERS: Mapping[str, tuple[type[ShardedOptimizer[Any]], type[Optimizer], Mapping[str, Any]]] = {
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
        return llama(self.hidden, self.layers)


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
            taken = seconds(optimizer.step)
            if step >= warm_up:
                times[name].append(taken)
    return {
        name: Result(milliseconds=tuple(1000 * taken for taken in line), collectives=collectives[name])
        for name, line in zip(times, slowest(list(times.values())), strict=True)
    }


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


@click.command(context_settings={"show_default": True})
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="Mesh.  [default: all]")
@click.option(
    "--optimizer", "optimizers", type=click.Choice(list(OPTIMIZERS)), multiple=True, help="[default: all but adamw]"
)
@click.option("--steps", type=click.IntRange(1), default=30, help="Measured steps of each.")
@click.option("--warm-up", type=click.IntRange(1), default=5, help="Steps before these.")
@click.option("--hidden", type=click.IntRange(64), default=256, help="Hidden size of the Llama.")
@click.option("--layers", type=click.IntRange(1), default=8)
def main(cases: Sequence[str], optimizers: Sequence[str], steps: int, warm_up: int, hidden: int, layers: int) -> None:
    """Print one markdown table of medians and ratios."""
    shape = Shape(hidden=hidden, layers=layers)
    params = list(shape.build().parameters())
    click.echo(
        f"{environment('colossalai', 'transformers')} Llama of {hidden} hidden, {layers} layers: {len(params)} "
        f"tensors, {sum(param.numel() for param in params) / 1e6:.1f} M parameters. "
        f"Medians of {steps} steps after {warm_up} of warm-up.\n"
    )
    click.echo(heading(HEADER))
    for optimizer in optimizers or [name for name in OPTIMIZERS if name != "adamw"]:
        for case in cases or CASES:
            click.echo(measure(case, optimizer, steps, warm_up, shape))


def measure(case: str, optimizer: str, steps: int, warm_up: int, shape: Shape) -> str:
    """One line of the table; where theirs crashes, it says how."""
    ranks = CASES[case].num_ranks
    error = None
    try:
        results = run_ranks(ranks, contest, case, optimizer, steps, warm_up, shape, True, timeout=600.0)[0]
    except RankError as raised:
        error = str(raised).strip().splitlines()[-1]
        results = run_ranks(ranks, contest, case, optimizer, steps, warm_up, shape, False, timeout=600.0)[0]
    return line(case, optimizer, results, error)


def line(case: str, optimizer: str, results: dict[str, Result], error: str | None = None) -> str:
    """One line of the table.

    Args:
        case: name of the mesh.
        optimizer: name of the optimizer.
        results: by contestant.
        error: why there are none of theirs.
    """
    ours, alone, adamw = (median(results[name].milliseconds) for name in ("ours", "alone", "AdamW"))
    cells: list[Any] = [optimizer, case, CASES[case].num_ranks]
    if error is None:
        theirs = median(results["theirs"].milliseconds)
        ratio, their_time, calls = f"**{theirs / ours:.1f}**", f"{theirs:.1f}", str(results["theirs"].collectives)
    else:
        ratio, their_time, calls = "-", f"crashes: {error}", "-"
    cells += [ratio, f"{ours / alone:.2f}", f"{ours:.1f}", their_time, f"{alone:.1f}", f"{adamw:.1f}"]
    return row([*cells, results["ours"].collectives, calls])


if __name__ == "__main__":
    main()
