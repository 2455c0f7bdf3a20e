"""What a run leaves: losses.csv, loss.png, table.md, and the same table on the screen."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import RankFigures, Traffic, expected_bytes
from rich.console import Console
from rich.table import Table
from settings import Settings

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Point:
    """One optimizer step."""

    step: int
    """1 is the first; 0 is before it."""
    loss: float | None
    """Mean loss of the step's batch, before the step."""
    held_out: float | None
    """Mean held-out loss after the step, where it was measured."""
    block: str


@dataclass
class Curve:
    """The steps of a run, in order."""

    points: list[Point] = field(default_factory=list)

    def add(self, point: Point) -> None:
        self.points.append(point)

    @property
    def num_steps(self) -> int:
        return self.points[-1].step

    @property
    def steps(self) -> list[tuple[int, float]]:
        """(step, training loss)."""
        return [(point.step, point.loss) for point in self.points if point.loss is not None]

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(step, held-out loss)."""
        return [(point.step, point.held_out) for point in self.points if point.held_out is not None]

    @property
    def periods(self) -> list[tuple[int, int, str]]:
        """(first step, last step, block) of each stretch on one block."""
        found = []
        for block, group in groupby(self.points[1:], key=lambda point: point.block):
            steps = [point.step for point in group]
            found.append((steps[0], steps[-1], block))
        return found


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished run."""

    settings: Settings
    curve: Curve
    ranks: list[RankFigures]
    seconds: float


def write_losses(curve: Curve, path: Path) -> None:
    """One line a step; losses with all digits, so that runs can be compared."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "held_out", "block"])
        for point in curve.points:
            losses = ["" if loss is None else repr(loss) for loss in (point.loss, point.held_out)]
            writer.writerow([point.step, *losses, point.block])


def print_report(report: Report, console: Console, folder: Path) -> None:
    """Print the table and write it to table.md."""
    rows = [*_loss_rows(report), *_memory_rows(report), *_traffic_rows(report), *_time_rows(report)]
    table = Table(title=_title(report.settings), show_lines=False, title_justify="left")
    table.add_column("figure")
    table.add_column("value")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [f"| {name} | {value} |" for name, value in [("figure", "value"), ("---", "---"), *rows]]
    (folder / "table.md").write_text("\n".join([_title(report.settings), "", *lines, ""]), encoding="utf-8")
    console.print(f"losses.csv, loss.png, table.md{' and model/' if report.settings.save else ''} are in {folder}/")


def _title(settings: Settings) -> str:
    where = f"one process for {settings.world_size} ranks" if settings.reference else f"{settings.world_size} ranks"
    plugin = f"{settings.plugin}, zero stage {settings.zero_stage}, tp {settings.tp}"
    over = f" over {settings.base}" if settings.optimizer == "badam" and settings.base != "adamw" else ""
    return f"{settings.optimizer}{over} on {where} ({plugin}, {settings.precision}), {settings.steps} steps"


def _loss_rows(report: Report) -> list[tuple[str, str]]:
    (_, before), (_, after) = report.curve.held_out[0], report.curve.held_out[-1]
    rows = [
        ("held-out loss, nats per token", f"{before:.3f} before, {after:.3f} after"),
        ("held-out perplexity", f"{math.exp(before):,.0f} before, {math.exp(after):,.0f} after"),
    ]
    if report.settings.optimizer == "badam":
        num_blocks = len({block for _, _, block in report.curve.periods})
        switches = report.ranks[0].switching.steps
        rows.append(
            ("blocks", f"{num_blocks} trained, {switches} switches, one every {report.settings.switch_every} steps")
        )
    return rows


def _memory_rows(report: Report) -> list[tuple[str, str]]:
    rank = max(report.ranks, key=lambda figures: figures.memory.measured)
    memory, weights = rank.memory, expected_bytes(report.settings, rank.num_parameters, 0)
    full = expected_bytes(report.settings, rank.num_parameters, rank.num_parameters)
    rows = [
        (
            "parameters on a rank, in the largest block",
            f"{rank.num_parameters:,}, {memory.num_active:,} ({memory.block})",
        ),
        ("bytes in the step, formula (largest rank)", f"{memory.expected:,} ({memory.expected / MIB:.2f} MiB)"),
        (
            "bytes in the step, measured",
            f"{memory.measured:,} ({memory.measured / memory.expected:.4f} of the formula)",
        ),
        ("of these masters, states and gradients", f"{(memory.measured - weights) / MIB:.2f} MiB"),
    ]
    if memory.num_active < rank.num_parameters:
        rows.append(("the same formula with everything active", f"{full / MIB:.2f} MiB"))
    rows.append(("peak memory of the process", f"{max(figures.peak for figures in report.ranks) / MIB:,.0f} MiB"))
    return rows


def _traffic_rows(report: Report) -> list[tuple[str, str]]:
    if report.settings.reference:
        return []
    if report.settings.plugin == "ddp" and report.settings.optimizer != "badam":
        return [("collectives per step", "inside torch's DDP, where they are not counted")]
    ordinary, switching = report.ranks[0].ordinary, report.ranks[0].switching
    rows = [("collectives per step", _traffic(ordinary)), *_direction_rows(report)]
    if switching.steps:
        rows.append(("collectives in a step that ends a block", _traffic(switching)))
    return rows


def _direction_rows(report: Report) -> list[tuple[str, str]]:
    """Bytes per step of gradients and weights, refreshes and switches included, against AdamW's on all weights."""
    settings, rank = report.settings, report.ranks[0]
    steps = rank.ordinary.steps + rank.switching.steps
    reduction = "reduce_scatter_tensor" if settings.zero_stage == 2 else "all_reduce"
    directions = {"gradients reduced per step": reduction, "weights gathered per step": "all_gather_into_tensor"}
    if reduction == "all_reduce" and settings.tp > 1:
        # Tensor parallelism adds activations up with the same calls.
        del directions["gradients reduced per step"]
    if not settings.zero_stage:
        del directions["weights gathered per step"]
    full = (4 if settings.precision == "fp32" else 2) * rank.num_parameters
    rows = []
    for name, call in directions.items():
        sent = (rank.ordinary.bytes[call] + rank.switching.bytes[call]) / steps
        rows.append((name, f"{sent / MIB:.3f} MiB ({sent / full:.1%} of AdamW's {full / MIB:.3f} MiB)"))
    return rows


def _traffic(traffic: Traffic) -> str:
    """Average calls and bytes of a step, by kind."""
    parts = [
        f"{traffic.calls[name] / traffic.steps:.3g} {name} ({traffic.bytes[name] / traffic.steps / MIB:.3f} MiB)"
        for name in sorted(traffic.calls)
    ]
    return ", ".join(parts) or "none"


def _time_rows(report: Report) -> list[tuple[str, str]]:
    return [("seconds, from start to end", f"{report.seconds:.0f}")]


def plot(report: Report, path: Path) -> None:
    """The loss curve, the held-out losses, and below them which block was trained when."""
    blocks = sorted({block for _, _, block in report.curve.periods}, key=_natural)
    with_blocks = report.settings.optimizer == "badam"
    figure = Figure(figsize=(11, 5 + 0.28 * len(blocks) * with_blocks), layout="constrained")
    heights = [5, 0.28 * len(blocks)] if with_blocks else [1]
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0].tolist()
    _draw_losses(rows[0], report.curve)
    if with_blocks:
        _draw_blocks(rows, report.curve, blocks)
    rows[0].set(ylabel="loss, nats per token", xlim=(0, report.curve.num_steps))
    rows[-1].set(xlabel="optimizer step")
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(report.settings), x=0.01, ha="left")
    figure.savefig(path, dpi=140)


def _draw_losses(axes: Axes, curve: Curve) -> None:
    steps, losses = zip(*curve.steps, strict=True)
    axes.plot(steps, losses, color="0.72", linewidth=0.8, label="training batch")
    axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=2, label="training, smoothed")
    steps, losses = zip(*curve.held_out, strict=True)
    axes.plot(steps, losses, "o-", color="tab:red", markersize=5, linewidth=1, clip_on=False, label="held out")
    axes.annotate(f"{losses[-1]:.2f}", (steps[-1], losses[-1]), (5, -3), textcoords="offset points", color="tab:red")
    axes.legend(frameon=False, loc="upper right")


def _draw_blocks(rows: Sequence[Axes], curve: Curve, blocks: list[str]) -> None:
    """A lane per block, a bar per period; the switches run as dotted lines through the loss."""
    palette = colormaps["tab10"]
    for first, last, block in curve.periods:
        lane = blocks.index(block)
        rows[1].barh(lane, last - first + 1, left=first - 1, height=0.72, color=palette(lane % 10))
        rows[0].axvline(first - 1, color="0.6", linewidth=0.5, linestyle=":", zorder=0)
    rows[1].set_yticks(range(len(blocks)), blocks, fontsize=8)
    rows[1].set(ylabel="active block", ylim=(len(blocks) - 0.5, -0.5))


def _natural(block: str) -> list[tuple[int, str]]:
    """Sort key: layers.10 comes after layers.9, and the head is last."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in block.split(".")]
    return [(int(block == "head"), ""), *parts]


def _smooth(losses: tuple[float, ...], weight: float = 0.8) -> list[float]:
    """Exponential average, without the bias of its start."""
    smoothed, average = [], 0.0
    for index, loss in enumerate(losses, start=1):
        average = weight * average + (1 - weight) * loss
        smoothed.append(average / (1 - weight**index))
    return smoothed
