"""Time the inner optimizer step against ColossalAI's, both in one process group.

    python examples/benchmark_optimizers.py                                   # all of it: one markdown table
    python examples/benchmark_optimizers.py --case zero2 --optimizer came --steps 50

It starts its own ranks; no GPU is needed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

import click
from contest import CASES, OPTIMIZERS, Result, Shape, contest

from colossal_bcd.testing import RankError, run_ranks

HEADER = (
    "optimizer", "mesh", "ranks", "theirs / ours", "ours / alone", "ours, ms", "theirs, ms", "alone, ms",
    "torch AdamW, ms", "collectives, ours", "theirs",
)  # fmt: skip


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
    click.echo(environment(steps, warm_up, shape) + "\n")
    click.echo(line(HEADER) + "\n" + line(["---"] * len(HEADER)))
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
    return row(case, optimizer, results, error)


def row(case: str, optimizer: str, results: dict[str, Result], error: str | None = None) -> str:
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
    return line([*cells, results["ours"].collectives, calls])


def line(cells: Sequence[Any]) -> str:
    """Cells as a line of markdown."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def environment(steps: int, warm_up: int, shape: Shape) -> str:
    """What was measured, on what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "colossalai", "transformers"))
    model = shape.build()
    params = list(model.parameters())
    return (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, one thread per rank, gloo; "
        f"Python {platform.python_version()}, {packages}. "
        f"Llama of {shape.hidden} hidden, {shape.layers} layers: {len(params)} tensors, "
        f"{sum(param.numel() for param in params) / 1e6:.1f} M parameters. "
        f"Medians of {steps} steps after {warm_up} of warm-up; load average {os.getloadavg()[0]:.1f} at the start."
    )


if __name__ == "__main__":
    main()
