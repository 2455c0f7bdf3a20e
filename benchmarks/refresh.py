"""Time the refreshes of GaLore's bases: by method, on two ranks against one, and staggered.

    python benchmarks/refreshes.py                                  # all of it: three markdown tables
    python benchmarks/refreshes.py --part methods --shape 1024x1024 --train-steps 0
    python benchmarks/refreshes.py --part ranks --method subspace

It starts its own ranks; no GPU is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import click
import torch
import torch.distributed as dist
from common import environment, heading, llama, row, slowest
from data import load_corpus
from torch import Tensor, nn

from colossal_bcd import GaLoreAdamW
from colossal_bcd.low_rank.projector import Bases, Method, captured_energy, random_bases, singular_bases, subspace_bases
from colossal_bcd.sharding import Layout, Mesh
from colossal_bcd.testing import run_ranks

METHODS_HEADER = (
    "shape", "gradient", "exact, s", "exact / subspace", "exact / random", "energy, exact",
    "subspace / exact", "warm subspace / exact", "random / exact",
)  # fmt: skip
RANKS_HEADER = (
    "method", "2 ranks / 1, wall", "fastest / fastest, wall", "2 ranks / 1, processor", "1 rank, ms", "2 ranks, ms",
    "1 rank, processor ms", "2 ranks, processor ms",
)  # fmt: skip
STAGGER_HEADER = (
    "method", "gap", "largest step / unstaggered, wall", "processor", "largest, ms", "unstaggered, ms", "mean, ms",
    "mean unstaggered, ms",
)  # fmt: skip


VOCABULARY = 2048


@dataclass(frozen=True)
class Seconds:
    """Of one step: by the clock on the rank that took longest, and of processor time on the busiest rank."""

    wall: float
    cpu: float


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Matrices of a Llama: seven per layer."""

    hidden: int = 512
    layers: int = 4

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of all matrices, in the order of the layers."""
        hidden, inner = self.hidden, self.hidden * 8 // 3 // 16 * 16
        return [*[(hidden, hidden)] * 4, *[(inner, hidden)] * 2, (hidden, inner)] * self.layers


def real_gradients(shape: tuple[int, int], train_steps: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Gradients of a matrix of a one-layer Llama on the text that ships with CPython: of two successive steps.

    Square ones are those of the query projection, others those of the gate projection [inner, hidden].

    Args:
        shape: [R, C] with R >= C.
        train_steps: AdamW steps before.
        tokens: in a batch.
    """
    rows, hidden = shape
    length = 256
    corpus = load_corpus(None, None, "bpe", VOCABULARY, length, 1)
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    model: Any = llama(hidden, 1, VOCABULARY, intermediate_size=max(rows, 2 * hidden), **heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    layer = model.model.layers[0]
    weight = layer.self_attn.q_proj.weight if rows == hidden else layer.mlp.gate_proj.weight
    kept: list[Tensor] = []
    for step in range(train_steps + 2):
        batch = corpus.batch(step, tokens // length, 0)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        kept = [*kept[-1:], weight.grad.clone()]
        optimizer.step()
    return kept[0], kept[1]


def noisy_gradients(shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two draws of noise, on a steady matrix of the given rank that has as much energy; rank 0: of noise alone."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    low = low / max(rank, 1) ** 0.5
    return low + torch.randn(shape, generator=generator), low + torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Contestant:
    """One way to compute bases, on one matrix."""

    seconds: tuple[float, ...]
    energy: float


def methods_on(before: Tensor, matrix: Tensor, rank: int, repeats: int) -> dict[str, Contestant]:
    """Exact singular vectors, subspace iteration from nothing and from the last bases, and random bases, in turn."""
    side = "right"
    last = singular_bases(before, rank, side)
    ways: dict[str, Callable[[], Bases]] = {
        "exact": lambda: singular_bases(matrix, rank, side),
        "subspace": lambda: subspace_bases(matrix, rank, side, (None, None), seed=1),
        "subspace, warm": lambda: subspace_bases(matrix, rank, side, last, seed=1),
        "random": lambda: random_bases((matrix.shape[0], matrix.shape[1]), rank, side, 1, matrix),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    energies: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, compute in ways.items():
            begin = time.process_time()
            bases = compute()
            if repeat:  # the first one is warm-up
                seconds[name].append(time.process_time() - begin)
            energies[name] = captured_energy(matrix, bases).item()
    return {name: Contestant(tuple(seconds[name]), energies[name]) for name in ways}


def refresh_steps(sizes: Sizes, method: Method, rank: int, repeats: int) -> dict[str, list[Seconds]]:
    """Steps that refresh all bases, in turn on all ranks and on rank 0 alone, while the others sleep."""
    together, alone = _Side(sizes, method, rank, gap=1), None
    if dist.get_rank() == 0:
        alone = _Side(sizes, method, rank, gap=1, sharded=False)
    found: dict[str, list[Seconds]] = {"together": [], "alone": []}
    for _ in range(repeats + 1):
        found["together"].append(_slowest(together.step))
        found["alone"].append(_slowest(alone.step if alone is not None else None))
    return {name: seconds[1:] for name, seconds in found.items()}


def staggered_steps(sizes: Sizes, method: Method, rank: int, gap: int, repeats: int) -> dict[str, list[Seconds]]:
    """All steps of some gaps, with every layer refreshed in the same step and with the refreshes spread, in turn."""
    sides = {"together": _Side(sizes, method, rank, gap), "staggered": _Side(sizes, method, rank, gap, stagger=gap)}
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    for step in range(gap * (repeats + 1)):
        for name, side in sides.items():
            seconds = _slowest(side.step)
            if step >= gap:  # the first gap, which begins with a refresh of everything, is warm-up
                found[name].append(seconds)
    return found


class _Side:
    """GaLore on this rank's slices of the matrices, or on whole ones."""

    def __init__(
        self, sizes: Sizes, method: Method, rank: int, gap: int, *, stagger: int = 1, sharded: bool = True
    ) -> None:
        world, rank_of_slice = (dist.get_world_size(), dist.get_rank()) if sharded else (1, 0)
        layouts = [Layout.whole(shape).sliced("zero", rank_of_slice, world) for shape in sizes.shapes]
        params = [nn.Parameter(torch.zeros(layout.local_shape)) for layout in layouts]
        for index, (param, layout) in enumerate(zip(params, layouts, strict=True)):
            whole = torch.randn(layout.shape, generator=torch.Generator().manual_seed(index))
            param.grad = layout.shard(whole)
        self._optimizer = GaLoreAdamW(
            [{"params": params, "rank": rank}], update_proj_gap=gap, stagger=stagger, svd_method=method, clamp=True
        )
        group = dist.group.WORLD if sharded else None
        mesh = Mesh({"zero": () if group is None else group})
        self._optimizer.bind(dict(zip(params, layouts, strict=True)), mesh)

    def step(self) -> None:
        self._optimizer.step()


def _slowest(step: Callable[[], None] | None) -> Seconds:
    """Time of one step on the rank that takes longest."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    if step is not None:
        step()
    return Seconds(*slowest([time.perf_counter() - wall, time.process_time() - cpu]))


def chosen(sizes: Sequence[str]) -> list[tuple[int, int]]:
    """Shapes from their names, such as "2048x2048"."""
    return [(int(rows), int(columns)) for rows, _, columns in (size.partition("x") for size in sizes)]


@click.command(context_settings={"show_default": True})
@click.option(
    "--part", "parts", type=click.Choice(["methods", "ranks", "stagger"]), multiple=True, help="[default: all]"
)
@click.option(
    "--shape", "shapes", multiple=True, default=("1024x1024", "4096x1024", "2048x2048"), help="Rows x columns."
)
@click.option("--method", "methods", type=click.Choice(["exact", "subspace"]), multiple=True, help="[default: both]")
@click.option("--rank", type=click.IntRange(1), default=128)
@click.option("--repeats", type=click.IntRange(1), default=5, help="Measured repeats of each, after one of warm-up.")
@click.option("--train-steps", type=click.IntRange(0), default=4, help="Of the model whose gradients are taken.")
@click.option("--tokens", type=click.IntRange(256), default=2048, help="In a batch of these steps.")
@click.option("--hidden", type=click.IntRange(16), default=512, help="Of the Llama whose matrices ranks refresh.")
@click.option("--layers", type=click.IntRange(1), default=4)
@click.option("--gap", type=click.IntRange(2), default=8, help="Steps of a gap over which refreshes are staggered.")
def main(
    parts: Sequence[str],
    shapes: Sequence[str],
    methods: Sequence[str],
    rank: int,
    repeats: int,
    train_steps: int,
    tokens: int,
    hidden: int,
    layers: int,
    gap: int,
) -> None:
    """Print one markdown table for each part."""
    torch.set_num_threads(1)
    sizes = Sizes(hidden=hidden, layers=layers)
    click.echo(
        f"{environment('transformers')} Rank {rank}. Ranks refresh {len(sizes.shapes)} matrices: those of a Llama of "
        f"{hidden} hidden, {layers} layers. Medians of {repeats} after one of warm-up."
    )
    asked = [cast(Method, method) for method in methods or ("exact", "subspace")]
    if "methods" in parts or not parts:
        click.echo("\n" + heading(METHODS_HEADER))
        for shape in chosen(shapes):
            for line in method_rows(shape, rank, repeats, train_steps, tokens):
                click.echo(line)
    if "ranks" in parts or not parts:
        click.echo("\n" + heading(RANKS_HEADER))
        for method in asked:
            results = run_ranks(2, refresh_steps, sizes, method, min(rank, hidden), repeats, timeout=1200.0)[0]
            click.echo(rank_row(method, results["together"], results["alone"]))
    if "stagger" in parts or not parts:
        click.echo("\n" + heading(STAGGER_HEADER))
        for method in asked:
            results = run_ranks(2, staggered_steps, sizes, method, min(rank, hidden), gap, repeats, timeout=1200.0)[0]
            click.echo(stagger_row(method, gap, results["staggered"], results["together"]))


def method_rows(shape: tuple[int, int], rank: int, repeats: int, train_steps: int, tokens: int) -> list[str]:
    """Lines of the first table for one shape."""
    gradients = {
        "real": real_gradients(shape, train_steps, tokens),
        "low rank + noise": noisy_gradients(shape, rank, seed=0),
        "noise": noisy_gradients(shape, 0, seed=1),
    }
    lines = []
    for name, (before, matrix) in gradients.items():
        found = methods_on(before, matrix, rank, repeats)
        exact = median(found["exact"].seconds)
        ratios = [exact / median(found[way].seconds) for way in ("subspace", "random")]
        parts = [found[way].energy / found["exact"].energy for way in ("subspace", "subspace, warm", "random")]
        times = [f"{exact:.3f}", *(f"**{ratio:.1f}**" for ratio in ratios)]
        energies = [f"{found['exact'].energy:.3f}", *(f"{part:.4f}" for part in parts)]
        lines.append(row([f"{shape[0]}x{shape[1]}", name, *times, *energies]))
    return lines


def rank_row(method: str, together: Sequence[Seconds], alone: Sequence[Seconds]) -> str:
    """One line of the second table."""
    wall, cpu = (
        [median(getattr(each, kind) for each in side) for side in (together, alone)] for kind in ("wall", "cpu")
    )
    # Where other programs take the processors, the fastest step is the one that they disturbed least.
    fastest = [min(each.wall for each in side) for side in (together, alone)]
    ratios = [f"**{two / one:.2f}**" for two, one in (wall, fastest, cpu)]
    return row([method, *ratios, *(f"{1000 * value:.0f}" for value in (wall[1], wall[0], cpu[1], cpu[0]))])


def stagger_row(method: str, gap: int, staggered: Sequence[Seconds], together: Sequence[Seconds]) -> str:
    """One line of the third table: the largest step of a gap, in the median over gaps."""

    def largest(side: Sequence[Seconds], kind: str) -> float:
        values = [getattr(each, kind) for each in side]
        return median(max(values[begin : begin + gap]) for begin in range(0, len(values), gap))

    walls = largest(staggered, "wall"), largest(together, "wall")
    processor = largest(staggered, "cpu") / largest(together, "cpu")
    means = [sum(each.wall for each in side) / len(side) for side in (staggered, together)]
    return row(
        [
            method,
            gap,
            f"**{walls[0] / walls[1]:.2f}**",
            f"**{processor:.2f}**",
            *(f"{1000 * value:.0f}" for value in (*walls, *means)),
        ]
    )


if __name__ == "__main__":
    main()
