"""Draw the picture of the README: bytes of one GPU by the estimate, and losses of the demo with AdamW beside it.

    python benchmarks/readme_picture.py                       # docs/pictures/readme.png, 2 to 5 minutes on two cores
    python benchmarks/readme_picture.py --losses build/losses # again from the losses of the last run
    python benchmarks/readme_picture.py -- --steps 600        # other flags of the demo

Left: `colossal-bcd estimate MODEL --compare adamw,lora,galore,badam --batch 2 --length 1024 --checkpointing`, when each
needs most.  Right: the demo on one process, `examples/finetune/main.py --reference`, with BAdam and with AdamW, each at
the demo's rate for it, shorter than `make demo`: 300 steps of 8 x 64 tokens in float32.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from colossal_bcd.cli.budget import CARDS, GB, ROWS, Budget, Job, budget
from colossal_bcd.cli.models import read_model
from colossal_bcd.cli.tables import COLOURS

ROOT = Path(__file__).parents[1]
COMPARED = {"adamw": "AdamW", "lora": "LoRA", "galore": "GaLore", "badam": "BAdam"}
"""Names of the command line -> labels."""
RUNS = {"badam": ("BAdam, one of 6 blocks at a time", COLOURS[0]), "adamw": ("AdamW, all weights", COLOURS[1])}
BATCH, LENGTH = 2, 1024
SHORT = ("--reference", "--ranks", "1", "--precision", "fp32", "--batch-size", "8", "--sequence-length", "64",
         "--steps", "300", "--no-save")  # fmt: skip


def budgets(model: str, batch: int, length: int) -> list[Budget]:
    """What each optimizer of the left panel needs."""
    made = read_model(model)
    return [
        budget(Job(model=made, optimizer=name, batch=batch, length=length, checkpointing=True)) for name in COMPARED
    ]


def train(folder: Path, flags: Sequence[str]) -> None:
    """Run the demo for each curve of the right panel; its files go to a folder of each name."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    program = [sys.executable, str(ROOT / "examples/finetune/main.py"), *SHORT, *flags]
    runs = [
        subprocess.Popen([*program, "--optimizer", name, "--output", str(folder / name)], env=environment)
        for name in RUNS
    ]
    failed = [name for name, run in zip(RUNS, runs, strict=True) if run.wait()]
    if failed:
        raise click.ClickException(f"the demo failed with --optimizer {', '.join(failed)}; see its error above.")


def read_losses(path: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and losses of a column of a run's losses.csv: "loss" or "held_out"."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row[column]]
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def draw_bytes(found: Sequence[Budget], axes: Axes) -> None:
    """Stacked bars of the moment in which each needs most, with the common cards as lines."""
    labels, bottoms = list(COMPARED.values()), [0.0] * len(found)
    most = [max((each.passes, each.step), key=lambda moment: moment.total) for each in found]
    for name, colour in zip(ROWS, COLOURS, strict=True):
        heights = [getattr(each, name) / GB for each in most]
        axes.bar(labels, heights, bottom=bottoms, label=name, color=colour, width=0.62)
        bottoms = [sum(pair) for pair in zip(bottoms, heights, strict=True)]
    top = 1.1 * max(bottoms)
    for index, height in enumerate(bottoms):
        axes.text(index, height + 0.012 * top, f"{height:.1f}", ha="center", fontweight="bold")
    for card in (card for card in CARDS if card < top):
        axes.axhline(card, color="0.65", linestyle="--", linewidth=0.8, zorder=0)
        axes.annotate(
            f"{card} GB", (1, card), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            va="center", color="0.4", fontsize=8,
        )  # fmt: skip
    job = found[0].job
    axes.set(ylim=(0, top), ylabel="GB on one GPU, estimated")
    axes.set_title(f"{job.model.name}, {job.batch} x {job.length} tokens, checkpointing", fontsize=10)
    axes.legend(edgecolor="none", framealpha=1, fontsize=9)


def draw_losses(folder: Path, axes: Axes) -> None:
    """Two curves for each run, with the last held-out loss at the end."""
    last = 1
    for name, (label, colour) in RUNS.items():
        axes.plot(*read_losses(folder / name / "losses.csv", "loss"), color=colour, linewidth=0.7, alpha=0.45)
        steps, losses = read_losses(folder / name / "losses.csv", "held_out")
        axes.plot(steps, losses, "o-", color=colour, label=label, linewidth=1.6, markersize=4)
        axes.annotate(
            f"{losses[-1]:.2f}", (steps[-1], losses[-1]), xytext=(6, -3), textcoords="offset points", color=colour
        )
        last = max(last, steps[-1])
    axes.set(xlabel="steps", ylabel="loss, nats per token (dots: held out)", xlim=(0, 1.1 * last))
    axes.set_title("the demo: a small Llama from random weights", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=ROOT / "docs/pictures/readme.png")
@click.option(
    "--losses", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Take these; train nothing."
)
@click.option("--model", default="llama-3-8b", help="Of the left panel.")
@click.argument("flags", nargs=-1)
def main(output: Path, losses: Path | None, model: str, flags: tuple[str, ...]) -> None:
    """Draw both panels; FLAGS after `--` go to the demo."""
    if losses is None:
        losses = ROOT / "build/losses"
        train(losses, flags)
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_bytes(budgets(model, BATCH, LENGTH), left)
    draw_losses(losses, right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    click.echo(f"{output.name} is drawn; the losses are in {losses.name}/")


if __name__ == "__main__":
    main()
