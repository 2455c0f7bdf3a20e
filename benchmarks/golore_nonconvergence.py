"""GaLore stalls where GoLore converges: the counterexample of arXiv 2410.11289 on the optimizers of this package.

    python benchmarks/golore_nonconvergence.py                                   # the paper's lengths
    python benchmarks/golore_nonconvergence.py --optimizer adamw --steps 5000    # the same picture in seconds

A quadratic over 10x10 matrices whose noise lives where the gradient vanishes.  Once the gradient's singular values fall
below the noise, the singular vectors at a refresh are the noise's, and nothing that matters is updated any more.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from colossal_bcd import GaLoreAdamW
from colossal_bcd.low_rank.projector import random_bases, singular_bases

SIZE, RANK, GAP, SIGMA, LR = 10, 4, 100, 1.0, 3e-5
TOP = SIZE - RANK
DRAWS = 100
"""Noise draws whose mean a large batch sees at a refresh."""
POINTS = 500
"""Of each curve."""
FLOOR = 1e-5
"""Of the picture: full-parameter AdamW goes far below."""


@dataclass(frozen=True)
class Inner:
    """An inner rule as the paper runs it."""

    title: str
    steps: int
    rand_ratio: float
    """Fraction of the steps after which GoLore's bases are random."""


@dataclass(frozen=True)
class Method:
    """A curve."""

    title: str
    color: str
    projected: bool = True
    large_batch: bool = False
    late_random: bool = False


INNERS = {"adamw": Inner("AdamW", 100_000, 0.5), "sgd": Inner("SGD", 200_000, 0.25)}
METHODS = {
    "full": Method("full parameters", "0.45", projected=False),
    "galore": Method("GaLore", "tab:red"),
    "galore_large_batch": Method("GaLore, large batch", "tab:orange", large_batch=True),
    "golore": Method("GoLore", "tab:blue", late_random=True),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one curve is made with."""

    inner: str
    method: str
    steps: int
    seed: int
    reproject: bool = True
    """GoLore carries its first moment over to new bases (AdamW)."""

    @property
    def lr(self) -> float:
        """The paper's, times what the run is shorter than the paper's."""
        return LR * INNERS[self.inner].steps / self.steps


@dataclass(frozen=True)
class Point:
    """Where a run is after `step` steps."""

    step: int
    gap: float
    """f(X) - min f."""
    gradient: float
    """Norm of the gradient without noise."""
    singular: float
    """Its largest singular value."""


class Problem:
    """min f(X) = |T|^2 / 2 + <D, T's first 6 columns>, T the first 6 rows of X; noise on its last 4 rows and columns.

    The minimum is -|D|^2 / 2, so that the gradient T + [D 0] has the norm sqrt(2 (f - min f)).

    Args:
        seed: of D and of the first X.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shift = SIGMA * torch.randn(TOP, TOP, generator=generator)
        self._shift = torch.cat([shift, torch.zeros(TOP, RANK)], dim=1).double()
        bottom = SIGMA * torch.randn(RANK, SIZE, generator=generator)
        # In float32 the last steps of a run, 1e-7 of a weight, would be lost to rounding.
        self.x = torch.nn.Parameter(torch.cat([SIGMA / 2 * torch.eye(TOP, SIZE), bottom]).double())
        self.x.grad = torch.zeros_like(self.x)
        # Views, made once: a step of a 10x10 matrix is all overhead.
        self._top, self._gradient = self.x.detach()[:TOP], self.x.grad[:TOP]
        self._noise = self.x.grad.diagonal()[TOP:]

    def set_gradient(self, noise: float) -> None:
        """Leave the gradient at X, with noise * I in the corner, in `x.grad`."""
        torch.add(self._top, self._shift, out=self._gradient)
        self._noise.fill_(noise)

    def point(self, step: int) -> Point:
        gradient = self._top + self._shift
        norm = gradient.norm().item()
        return Point(step, norm**2 / 2, norm, torch.linalg.matrix_norm(gradient, 2).item())


def noises(run: Run) -> list[float]:
    """The noise of each step: +-sigma, and for a large batch the mean of 100 such draws at each refresh."""
    generator = torch.Generator().manual_seed(run.seed + 1)
    values = SIGMA * (2.0 * torch.randint(2, (run.steps,), generator=generator) - 1)
    if METHODS[run.method].large_batch:
        refreshes = values[::GAP]
        draws = 2.0 * torch.randint(2, (len(refreshes), DRAWS), generator=generator) - 1
        refreshes.copy_(SIGMA * draws.mean(dim=1))
    return values.tolist()


def stepper(run: Run, x: torch.nn.Parameter) -> Callable[[], object]:
    """What makes one step on `x.grad`."""
    method, inner = METHODS[run.method], INNERS[run.inner]
    if not method.projected and run.inner == "adamw":
        return torch.optim.AdamW([x], lr=run.lr, foreach=False).step
    if not method.projected:
        return torch.optim.SGD([x], lr=run.lr, foreach=False).step
    begin = math.ceil(inner.rand_ratio * run.steps) if method.late_random else None
    if run.inner == "sgd":
        return ProjectedSGD(x, run.lr, begin, run.seed).step
    return GaLoreAdamW(
        [x],
        lr=run.lr,
        rank=RANK,
        update_proj_gap=GAP,
        scale=1.0,
        proj_type="left",
        random_from_step=begin,
        reproject_momentum=method.late_random and run.reproject,
        seed=run.seed,
    ).step


class ProjectedSGD:
    """SGD on the left projection of one matrix's gradient: the paper's inner rule without moments.

    Args:
        x: the matrix.
        lr: step size.
        random_from: refreshes from this step on draw random bases; None: never.
        seed: of these.
    """

    def __init__(self, x: torch.nn.Parameter, lr: float, random_from: int | None, seed: int) -> None:
        self._x, self._lr, self._random_from = x, lr, random_from
        self._seeds = torch.Generator().manual_seed(seed)
        self._basis: Tensor | None = None
        self._step = 0

    @torch.no_grad()
    def step(self) -> None:
        gradient = self._x.grad
        assert gradient is not None
        if self._step % GAP == 0:
            if self._random_from is not None and self._step >= self._random_from:
                seed = int(torch.randint(2**31, (), generator=self._seeds))
                self._basis, _ = random_bases((SIZE, SIZE), RANK, "left", seed, gradient)
            else:
                self._basis, _ = singular_bases(gradient, RANK, "left")
        assert self._basis is not None
        self._x.sub_(self._basis @ (self._basis.T @ gradient), alpha=self._lr)
        self._step += 1


def trace(run: Run, show: Callable[[Point], None]) -> list[Point]:
    """Make a run.

    Args:
        run: which.
        show: called with each point.
    """
    problem = Problem(run.seed)
    step = stepper(run, problem.x)
    points = [problem.point(0)]
    every = max(run.steps // POINTS, 1)
    for number, noise in enumerate(noises(run), start=1):
        problem.set_gradient(noise)
        step()
        if number % every == 0 or number == run.steps:
            points.append(problem.point(number))
            show(points[-1])
    return points


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
