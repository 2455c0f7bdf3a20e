"""GaLore stalls where GoLore converges: the counterexample of arXiv 2410.11289 on the optimizers of this package.

python examples/nonconvergence/nonconvergence.py                                   # the paper's lengths
python examples/nonconvergence/nonconvergence.py --optimizer adamw --steps 5000    # the same picture in seconds
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from quadratic import GAP, INNERS, METHODS, SIGMA, Inner, Point, Run, trace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

FLOOR = 1e-5
"""Of the picture: full-parameter AdamW goes far below."""

Curves = dict[str, dict[str, list[Point]]]
"""By inner rule and method."""


def write(curves: Curves, path: Path) -> None:
    """One line a point."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["optimizer", "method", "step", "gap", "gradient_norm", "largest_singular_value"])
        for inner, by_method in curves.items():
            for method, points in by_method.items():
                for point in points:
                    writer.writerow([inner, method, point.step, point.gap, point.gradient, point.singular])


def plot(curves: Curves, path: Path) -> None:
    """The gap over the steps, a panel for each inner rule."""
    figure = Figure(figsize=(1.2 + 5.8 * len(curves), 4.8), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0].tolist()
    for axes, (inner, by_method) in zip(panels, curves.items(), strict=True):
        draw(axes, INNERS[inner], by_method)
    panels[0].set(ylabel="f(X) - min f")
    figure.suptitle("GaLore stalls where the gradient falls below the noise; GoLore goes on", x=0.01, ha="left")
    figure.savefig(path, dpi=140)


def draw(axes: Axes, inner: Inner, by_method: dict[str, list[Point]]) -> None:
    """One panel: curves with their names and last gaps at their ends."""
    steps, place = by_method["full"][-1].step, math.inf
    for name, points in sorted(by_method.items(), key=lambda item: -item[1][-1].gap):
        method, last = METHODS[name], points[-1].gap
        axes.plot([point.step for point in points], [point.gap for point in points], color=method.color, linewidth=1.8)
        # Names that would touch move down.
        place = max(min(last, place / 2.2), FLOOR)
        axes.annotate(
            f"{method.title} {last:.2g}", (steps, place), (6, 0), textcoords="offset points", va="center",
            color=method.color, fontsize=9, annotation_clip=False,
        )  # fmt: skip
    begin = inner.rand_ratio * steps
    axes.axvline(begin, color="tab:blue", linewidth=0.8, linestyle=":")
    axes.text(begin, 1.4 * FLOOR, " GoLore's bases\n random from here", color="tab:blue", fontsize=8, va="bottom")
    mark_stall(axes, by_method["galore"])
    axes.set(title=inner.title, xlabel="step", yscale="log", xlim=(0, steps), ylim=(FLOOR, None))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)


def mark_stall(axes: Axes, points: list[Point]) -> None:
    """A dot where the gradient's singular values have all fallen below the noise's, if they do."""
    stalled = next((point for point in points if point.singular < SIGMA), None)
    if stalled is None:
        return
    axes.plot(stalled.step, stalled.gap, "o", color="tab:red", markersize=5)
    early = stalled.step < points[-1].step / 2
    axes.annotate(
        "the gradient's singular values\nare all below the noise's",
        (stalled.step, stalled.gap),
        (0, 8 if early else 20),
        textcoords="offset points",
        ha="left" if early else "right",
        color="tab:red",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def table(curves: Curves) -> Table:
    """Where the runs end."""
    found = Table(title="After the last step", title_justify="left")
    for name in ("inner rule", "method", "f - min f", "|gradient|", "largest singular value"):
        found.add_column(name)
    for inner, by_method in curves.items():
        for method, points in by_method.items():
            last = points[-1]
            cells = [f"{value:.3g}" for value in (last.gap, last.gradient, last.singular)]
            found.add_row(INNERS[inner].title, METHODS[method].title, *cells)
    return found


def run_all(runs: Sequence[Run], console: Console) -> Curves:
    """One run after the other."""
    columns = (TextColumn("{task.description:<26}"), BarColumn(bar_width=16), MofNCompleteColumn())
    curves: Curves = {run.inner: {} for run in runs}
    with Progress(*columns, TextColumn("gap {task.fields[gap]}"), TimeRemainingColumn(), console=console) as progress:
        for run in runs:
            name = f"{INNERS[run.inner].title}, {METHODS[run.method].title}"
            curves[run.inner][run.method] = shown(run, progress, progress.add_task(name, total=run.steps, gap="-"))
    return curves


def shown(run: Run, progress: Progress, task: TaskID) -> list[Point]:
    """A run with its bar."""
    return trace(run, lambda point: progress.update(task, completed=point.step, gap=f"{point.gap:.3g}"))


@click.command(context_settings={"show_default": True})
@click.option("--optimizer", type=click.Choice([*INNERS, "both"]), default="both", help="Inner rule.")
@click.option(
    "--steps", type=click.IntRange(GAP), help="Fewer steps take a larger lr.  [default: 100,000 AdamW, 200,000 SGD]"
)
@click.option("--seed", type=click.IntRange(0), default=42)
@click.option("--reproject/--no-reproject", default=True, help="Carry GoLore's first moment over to new bases (AdamW).")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("nonconvergence"))
def main(optimizer: str, steps: int | None, seed: int, reproject: bool, output: Path) -> None:
    """Run the four methods; leave gaps.csv and gaps.png in OUTPUT."""
    started, console = time.monotonic(), Console()
    inners = list(INNERS) if optimizer == "both" else [optimizer]
    runs = [
        Run(inner=inner, method=method, steps=steps or INNERS[inner].steps, seed=seed, reproject=reproject)
        for inner in inners
        for method in METHODS
    ]
    curves = run_all(runs, console)
    output.mkdir(parents=True, exist_ok=True)
    write(curves, output / "gaps.csv")
    plot(curves, output / "gaps.png")
    console.print(table(curves))
    console.print(f"gaps.csv and gaps.png are in {output}/, {time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
