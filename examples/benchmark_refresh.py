"""Time the refreshes of GaLore's bases: by method, on two ranks against one, and staggered.

    python examples/benchmark_refresh.py                                  # all of it: three markdown tables
    python examples/benchmark_refresh.py --part methods --shape 1024x1024 --train-steps 0
    python examples/benchmark_refresh.py --part ranks --method subspace

It starts its own ranks; no GPU is needed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median
from typing import cast

import click
import torch
from refresh_contest import (
    Seconds,
    Sizes,
    chosen,
    methods_on,
    noisy_gradients,
    real_gradients,
    refresh_steps,
    staggered_steps,
)

from colossal_bcd.low_rank.projector import Method
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
    click.echo(environment(rank, repeats, sizes))
    asked = [cast(Method, method) for method in methods or ("exact", "subspace")]
    if "methods" in parts or not parts:
        heading(METHODS_HEADER)
        for shape in chosen(shapes):
            for line in method_rows(shape, rank, repeats, train_steps, tokens):
                click.echo(line)
    if "ranks" in parts or not parts:
        heading(RANKS_HEADER)
        for method in asked:
            results = run_ranks(2, refresh_steps, sizes, method, min(rank, hidden), repeats, timeout=1200.0)[0]
            click.echo(rank_row(method, results["together"], results["alone"]))
    if "stagger" in parts or not parts:
        heading(STAGGER_HEADER)
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


def heading(cells: Sequence[str]) -> None:
    """Print the head of a table."""
    click.echo("\n" + row(cells) + "\n" + row(["---"] * len(cells)))


def row(cells: Sequence[object]) -> str:
    """Cells as a line of markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"


def environment(rank: int, repeats: int, sizes: Sizes) -> str:
    """What was measured, on what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, one thread per rank, gloo; "
        f"Python {platform.python_version()}, {packages}. Rank {rank}. Ranks refresh {len(sizes.shapes)} matrices: "
        f"those of a Llama of {sizes.hidden} hidden, {sizes.layers} layers. Medians of {repeats} after one of warm-up; "
        f"load average {os.getloadavg()[0]:.1f} at the start."
    )


if __name__ == "__main__":
    main()
