"""Time optimizer steps against the originals on one process, and against ColossalAI's distributed optimizers on ranks.

    python benchmarks/step.py                                          # all of it: one markdown table
    python benchmarks/step.py --size small --optimizer came --steps 50 # one process, tensors of a small Llama
    python benchmarks/step.py --mesh "zero2 x2" --kind whole           # boosted by both, on two ranks
    python benchmarks/step.py --size large --compile                   # ours with compile=True

An inner step is the base optimizer's on gradients that are there; a whole step is that of the boosted optimizer, after
backward: averages to masters, the inner step, weights to all ranks.  All sides take their steps in turn.  It starts its
own ranks; no GPU is needed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from colossalai.booster import Booster
from colossalai.booster import plugin as stock
from colossalai.nn.optimizer import DistributedAdaFactor, DistributedCAME, DistributedLamb
from colossalai.zero.low_level import LowLevelZeroOptimizer
from common import MESHES, Measured, Table, environment, in_turn, llama, ratio, to_file
from gpu import ELEMENTWISE, galore_bytes
from originals import CONTESTS, FUSED, fused_adamw
from torch import Tensor, nn
from torch.optim import Optimizer

from colossal_bcd import CAME, Adafactor, AdamW, Lamb
from colossal_bcd import booster as our_booster
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout
from colossal_bcd.testing import RankError, run_ranks

HEADER = (
    "optimizer", "where", "step", "against", "theirs / ours", "theirs / ours, processor time", "ours, ms",
    "theirs, ms", "ours, processor ms", "theirs, processor ms", "ours / fused AdamW, processor time",
    "least by bytes moved", "collectives, ours", "collectives, theirs",
)  # fmt: skip
DISTRIBUTED: Mapping[str, tuple[type[ShardedOptimizer[Any]], type[Optimizer], Mapping[str, Any]]] = {
    "adafactor": (Adafactor, DistributedAdaFactor, {}),
    "came": (CAME, DistributedCAME, {"lr": 1e-3}),
    "lamb": (Lamb, DistributedLamb, {"lr": 1e-3}),
    # ColossalAI has no distributed AdamW: torch's runs on the shards.
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 1e-3}),
}
"""Ours, theirs and the hyper-parameters that both get."""
GRADIENTS = 2
"""Different gradients that the steps go through."""
SIZES = ("small", "tenths", "large")
REGISTERED = {"adamw": "AdamW", "sgd": "SGD", "lion": "Lion", "lamb": "Lamb", "adafactor": "Adafactor", "came": "CAME"}
ADAMW_BYTES = 28


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is, and how often it is timed."""

    hidden: int = 256
    layers: int = 8
    steps: int = 10
    warm_up: int = 2

    def steps_of(self, size: str) -> int:
        """Large tensors, whose times spread less, take a third of the steps."""
        return max(self.steps // 3, 2) if size == "large" else self.steps


def shapes(size: str, scale: Scale) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors: of a Llama, ten tenths of each of them, or eight large matrices."""
    width = 8 * scale.hidden
    if size == "large":
        inner = 43 * width // 16
        matrices = [(width, width), (inner, width)] * 2 + [(width, width), (width, inner)] * 2
        return [(f"layers.{index // 2}.{index % 2}.weight", shape) for index, shape in enumerate(matrices)]
    with torch.device("meta"):
        model = llama(scale.hidden, scale.layers)
    whole = [(name, tuple(param.shape)) for name, param in model.named_parameters()]
    if size == "small":
        return whole
    return [(f"{name}.{tenth}", (-(-shape[0] // 10), *shape[1:])) for name, shape in whole for tenth in range(10)]


def rank_of(size: str, scale: Scale) -> int:
    """Of GaLore's projections: a sixteenth of the width."""
    return scale.hidden // (2 if size == "large" else 16)


def alone(name: str, size: str, scale: Scale, compiled: bool) -> dict[str, Measured]:
    """Steps on this process, in turn: "ours", each of the originals, and torch's fused AdamW on float32 weights."""
    contest, rank = CONTESTS[name], rank_of(size, scale)
    generator = torch.Generator().manual_seed(0)
    named = [(key, torch.randn(shape, generator=generator).to(contest.dtype)) for key, shape in shapes(size, scale)]
    grads = [[torch.randn(value.shape, generator=generator) for _, value in named] for _ in range(GRADIENTS)]
    options: dict[str, Any] = {"compile": True} if compiled else {}
    make: dict[str, Callable[[Any], Optimizer]] = {"ours": lambda copies: contest.ours(copies, rank, **options)}
    make |= {key: partial(build, rank=rank) for key, build in contest.originals.items()}
    make |= {key: partial(build, rank=rank) for key, build in (contest.floors if compiled else {}).items()}
    make.setdefault(FUSED, lambda copies: fused_adamw([param for _, param in copies]))
    sides: dict[str, tuple[list[nn.Parameter], Optimizer]] = {}
    for side, build in make.items():
        dtype = torch.float32 if side == FUSED else contest.dtype
        copies = [(key, nn.Parameter(value.to(dtype, copy=True))) for key, value in named]
        sides[side] = [param for _, param in copies], build(copies)

    def give_gradients(side: str, step: int) -> None:
        for params, _ in sides.values():
            for param in params:
                param.grad = None
        for param, grad in zip(sides[side][0], grads[step % GRADIENTS], strict=True):
            if param.requires_grad:
                param.grad = grad.to(param.dtype, copy=True)

    work = {side: optimizer.step for side, (_, optimizer) in sides.items()}
    return in_turn(work, scale.steps_of(size), scale.warm_up, give_gradients)


def least(name: str, size: str, scale: Scale) -> str:
    """Bytes that a step has to move by those of AdamW; see benchmarks/gpu.py for the sums."""
    if name == "galore":
        all_shapes = [shape for _, shape in shapes(size, scale)]
        values = sum(map(math.prod, all_shapes))
        return f"{galore_bytes(all_shapes, rank_of(size, scale)) / values / ADAMW_BYTES:.2f}"
    return f"{ELEMENTWISE[REGISTERED[name]][1] / ADAMW_BYTES:.2f}" if name in REGISTERED else "-"


def on_ranks(mesh: str, name: str, kind: str, scale: Scale, with_theirs: bool) -> dict[str, Measured]:
    """Steps of this rank: "ours", "theirs", and, of inner steps, torch's fused AdamW on the same shards."""
    warnings.filterwarnings("ignore")
    ranks = MESHES[mesh]
    our_class, their_class, hyper = DISTRIBUTED[name]
    # The check refuses a CPU; everything else of a step runs there.
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
    hosts: dict[str, tuple[Any, Any]] = {"ours": (our_booster, our_class)}
    if with_theirs:
        hosts["theirs"] = stock, their_class
    # A plugin destroys its process groups when it is collected.
    boosters = {side: Booster(plugin=getattr(host, ranks.plugin)(**ranks.options)) for side, (host, _) in hosts.items()}
    boosted = {side: _boost(boosters[side], cls, hyper, scale) for side, (_, cls) in hosts.items()}
    if kind == "whole":
        return _whole_steps(boosters, boosted, scale)
    return _inner_steps({side: engine for side, (_, engine) in boosted.items()}, scale)


def _boost(booster: Booster, cls: type[Optimizer], hyper: Mapping[str, Any], scale: Scale) -> tuple[Any, Any]:
    model = llama(scale.hidden, scale.layers)
    boosted, engine, *_ = booster.boost(model, cls(list(model.parameters()), **hyper))
    return boosted, engine


def _whole_steps(
    boosters: Mapping[str, Booster], boosted: Mapping[str, tuple[Any, Any]], scale: Scale
) -> dict[str, Measured]:
    def backward(side: str, step: int) -> None:
        model, engine = boosted[side]
        engine.zero_grad()
        tokens = torch.randint(0, 1024, (1, 16), generator=torch.Generator().manual_seed(step))
        boosters[side].backward(model(tokens, labels=tokens).loss, engine)

    work = {side: engine.step for side, (_, engine) in boosted.items()}
    return in_turn(work, scale.steps, scale.warm_up, backward)


def _inner_steps(engines: Mapping[str, Any], scale: Scale) -> dict[str, Measured]:
    ours = engines["ours"]
    layouts = {master: ours.masters.layout(param) for param, master in ours.masters.of.items()}
    sides = {
        side: ([param for group in engine.optim.param_groups for param in group["params"]], engine.optim)
        for side, engine in engines.items()
    }
    copies: list[Any] = [nn.Parameter(param.detach().clone()) for param in sides["ours"][0]]
    sides[FUSED] = copies, fused_adamw(copies)
    grads = [_gradients([layouts[param] for param in sides["ours"][0]], number) for number in range(GRADIENTS)]

    def give_gradients(side: str, step: int) -> None:
        for param, grad in zip(sides[side][0], grads[step % GRADIENTS], strict=True):
            param.grad = grad.clone()

    work = {side: optimizer.step for side, (_, optimizer) in sides.items()}
    return in_turn(work, scale.steps, scale.warm_up, give_gradients)


def _gradients(layouts: Iterable[Layout], number: int) -> list[Tensor]:
    """This rank's parts of one set of gradients that are the same for all sides."""
    generator = torch.Generator().manual_seed(number)
    return [layout.shard(torch.randn(layout.shape, generator=generator)) for layout in layouts]


def cells(start: Sequence[str], found: Mapping[str, Measured], theirs: str, least: str, error: str = "") -> list[Any]:
    """A row.

    Args:
        start: its first three cells.
        found: what was measured, by side.
        theirs: the side that ours is compared with.
        least: time by bytes moved, in fused AdamW's.
        error: why there is nothing of theirs.
    """
    ours = found["ours"]
    over_fused = f"{ours.cpu_ms / found[FUSED].cpu_ms:.2f}" if FUSED in found else "-"
    if theirs not in found:
        times = ["-", "-", f"{ours.ms:.1f}", f"crashes: {error}", f"{ours.cpu_ms:.1f}", "-"]
        return [*start, theirs, *times, over_fused, least, ours.collectives, "-"]
    other = found[theirs]
    return [
        *start,
        theirs,
        ratio(other.ms / ours.ms),
        f"{other.cpu_ms / ours.cpu_ms:.2f}",
        *(f"{value:.1f}" for value in (ours.ms, other.ms, ours.cpu_ms, other.cpu_ms)),
        over_fused,
        least,
        ours.collectives,
        other.collectives,
    ]


def rows_alone(name: str, size: str, scale: Scale, compiled: bool) -> list[list[Any]]:
    """Rows of one optimizer on one process, one for each original."""
    found = alone(name, size, scale, compiled)
    if name == "badam":  # its block is a part of the weights
        del found[FUSED]
    start = [f"{name}{', compiled' * compiled}", size, "inner"]
    contest = CONTESTS[name]
    against = [FUSED, *contest.floors] if compiled and FUSED in found else contest.originals
    return [cells(start, found, theirs, least(name, size, scale)) for theirs in against]


def row_on_ranks(name: str, mesh: str, kind: str, scale: Scale) -> list[Any]:
    """The row of one optimizer on ranks; where theirs crashes, it says how."""
    ranks, error = MESHES[mesh].num_ranks, ""
    try:
        found = run_ranks(ranks, on_ranks, mesh, name, kind, scale, True, timeout=900.0)[0]
    except RankError as raised:
        error = str(raised).strip().splitlines()[-1]
        found = run_ranks(ranks, on_ranks, mesh, name, kind, scale, False, timeout=900.0)[0]
    against = DISTRIBUTED[name][1].__name__
    if "theirs" in found:
        found[against] = found["theirs"]
    return cells([name, mesh, kind], found, against, "-", error)


def about(sizes: Sequence[str], meshes: Sequence[str], scale: Scale) -> str:
    """Environment and sizes."""
    told = []
    for size in dict.fromkeys([*sizes, *(["small"] if meshes else [])]):
        counts = [math.prod(shape) for _, shape in shapes(size, scale)]
        told.append(f"{size} are {len(counts)} tensors of {sum(counts) / 1e6:.1f} M values")
    versions = environment("colossalai", "transformers", "came_pytorch", "galore_torch", "badam", "lion-pytorch")
    return (
        f"{versions} Tensors: {'; '.join(told)}; ranks train the Llama of {scale.hidden} hidden and {scale.layers} "
        f"layers. Medians of {scale.steps} steps, of large tensors {scale.steps_of('large')}, after {scale.warm_up} "
        "of warm-up."
    )


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option(
    "--size", "sizes", type=click.Choice(SIZES), multiple=True, help="Tensors on one process.  [default: all, or none]"
)
@click.option(
    "--mesh", "meshes", type=click.Choice(list(MESHES)), multiple=True, help="Ranks.  [default: all, or none]"
)
@click.option("--kind", "kinds", type=click.Choice(["inner", "whole"]), multiple=True, help="[default: both, on ranks]")
@click.option("--optimizer", "optimizers", type=click.Choice(list(CONTESTS)), multiple=True, help="[default: all]")
@click.option("--compile", "compiled", is_flag=True, help="Pass compile=True to ours; one process only.")
@click.option("--steps", type=click.IntRange(1), default=Scale.steps, help="Measured steps of each side.")
@click.option("--warm-up", type=click.IntRange(2), default=Scale.warm_up, help="Steps before these.")
@click.option("--hidden", type=click.IntRange(64), default=Scale.hidden, help="Width of the Llama.")
@click.option("--layers", type=click.IntRange(1), default=Scale.layers, help="Layers of the Llama.")
@to_file
def main(
    sizes: Sequence[str],
    meshes: Sequence[str],
    kinds: Sequence[str],
    optimizers: Sequence[str],
    compiled: bool,
    output: Path | None,
    **scale: int,
) -> None:
    """Print one markdown table of medians and ratios."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if compiled and meshes:
        raise click.UsageError(f"--compile: got --mesh {meshes[0]!r}, expected none. Leave --mesh or --compile out.")
    if not sizes and not meshes:
        sizes, meshes = SIZES, () if compiled else tuple(MESHES)
    chosen, at = optimizers or tuple(CONTESTS), Scale(**scale)
    table = Table(about(sizes, meshes, at), HEADER, output)
    for size in sizes:
        for name in chosen:
            for line in rows_alone(name, size, at, compiled):
                table.add(line)
    for mesh in meshes:
        for name in (name for name in chosen if name in DISTRIBUTED):
            for kind in kinds or ("inner", "whole"):
                table.add(row_on_ranks(name, mesh, kind, at))


if __name__ == "__main__":
    main()
