"""Runs of several seeds as a table in Markdown and a picture: means and standard deviations.

python examples/pretrain/table.py runs/* --plot pretrain.png
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from figures import perplexity
from records import DataError
from tuning import entry

SAME = ("dataset_path", "eval_rows", "max_length", "model_config", "num_training_steps", "total_batch_size")
"""Flags without which runs are not to be compared."""
USED = (*SAME, "lr", "optimizer", "rand_ratio", "seed", "tags")
"""Flags that the results of pretrain.py have, and that are looked at here."""
PICTURES = (".png", ".pdf", ".svg")
COLORS = ("tab:red", "tab:blue", "tab:grey", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink")


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone.

    Attributes:
        title: what they are called.
        flags: of all of them.
        losses: held-out ones, by seed and step.
        seconds: of a step, by seed; None: the run was only resumed after its last step.
    """

    title: str
    flags: Mapping[str, str]
    losses: dict[str, dict[int, float]]
    seconds: dict[str, float | None]

    @property
    def last(self) -> dict[str, float]:
        """The loss after the last step, by seed."""
        return {seed: losses[max(losses)] for seed, losses in self.losses.items()}


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=lambda _, __, path: path and picture(path),
    help=f"A picture of the losses: {', '.join(PICTURES)}.",
)
def main(folders: tuple[Path, ...], plot: Path | None) -> None:
    """Compare what pretrain.py left in FOLDERS; the first of them is what the others are subtracted from."""
    found = read(folders)
    click.echo("\n".join(table(found)))
    if plot is not None:
        draw(found, plot)


def picture(path: Path) -> Path:
    """A name that a picture can have.

    Raises:
        DataError: its folder is missing, or its end says no format.
    """
    if path.suffix.lower() not in PICTURES:
        raise DataError(f"--plot {path}: expected a name that ends with {', '.join(PICTURES)}. Give one.")
    if not path.parent.is_dir():
        raise DataError(f"--plot {path}: got no folder {path.parent}. Make it, or give another.")
    return path


def read(folders: Sequence[Path]) -> list[Series]:
    """Runs by what they have in common, in the order of their first folders.

    Raises:
        DataError: a folder has no finished run, runs are of different data or sizes, or one is there twice.
    """
    found: dict[str, Series] = {}
    first: Mapping[str, str] = {}
    for folder in folders:
        run, losses, seconds = _left_in(folder)
        first = first or run
        different = [name for name in SAME if run[name] != first[name]]
        if different:
            raise DataError(
                f"{folder}: got {', '.join(f'{name} {run[name]}' for name in different)}, expected "
                f"{', '.join(f'{name} {first[name]}' for name in different)} of {folders[0]}. Leave it out."
            )
        if max(losses) != int(run["num_training_steps"]):
            raise DataError(f"{folder}: the run ended after step {max(losses)}. Let it go on with --resume.")
        flags = {name: value for name, value in run.items() if name != "seed"}
        title = run["optimizer"] if run["tags"] == "None" else run["tags"]
        series = found.setdefault(json.dumps(flags), Series(title, flags, {}, {}))
        if run["seed"] in series.losses:
            raise DataError(f"{folder}: seed {run['seed']} of {title} is there twice. Leave it out.")
        series.losses[run["seed"]], series.seconds[run["seed"]] = losses, seconds
    return list(found.values())


def table(found: Sequence[Series]) -> list[str]:
    """Lines of the table.  The last column has differences between runs of the same seed, as far as both have it."""
    rows = [["run", "lr", "seeds", "held-out loss", "perplexity", "seconds per step", f"loss minus {found[0].title}'s"]]
    rows.append(["---"] * len(rows[0]))
    for series in found:
        common = [seed for seed in series.last if seed in found[0].last]
        differences = [series.last[seed] - found[0].last[seed] for seed in common]
        seconds = [each for each in series.seconds.values() if each is not None]
        rows.append(
            [
                series.title, series.flags["lr"], str(len(series.last)), spread(list(series.last.values()), 3),
                spread([perplexity(loss) for loss in series.last.values()], 1),
                f"{median(seconds):.2f}" if seconds else "-",
                spread(differences, 3) if series is not found[0] and common else "-",
            ]
        )  # fmt: skip
    return [f"| {' | '.join(row)} |" for row in rows]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; one value has none."""
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {deviation(values):.{digits}f}" if len(values) > 1 else mean


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; 0 of one value, and no number where a run has diverged, which `stdev` does not take."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return stdev(values) if len(values) > 1 else 0.0


def draw(found: Sequence[Series], path: Path) -> None:
    """Held-out losses over steps, as means with bars of a standard deviation, and the last ones of all seeds."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(2, 1))
    for number, (title, series) in enumerate(zip(_titles(found), found, strict=True)):
        color, last = COLORS[number % len(COLORS)], list(series.last.values())
        _curve(curves, series, title, color)
        mean = fmean(last)
        ends.plot([number] * len(last), last, "o", color=color, alpha=0.5)
        ends.errorbar(number, mean, deviation(last), color=color, fmt="_", capsize=8, markersize=24)
        ends.annotate(f"{mean:.3f}", (number, mean), (14, 0), textcoords="offset points", va="center", fontsize=9)
    for step in {_random_from(series) for series in found} - {None}:
        assert step is not None
        curves.axvline(step, color="tab:blue", linewidth=0.8, linestyle=":")
        curves.text(step, curves.get_ylim()[1], "random bases from here ", fontsize=8, ha="right", va="top")
    counts = sorted({len(series.last) for series in found})
    curves.set(title="Held-out loss: mean and standard deviation", xlabel="step", ylabel="nats per token")
    curves.legend(frameon=False)
    ends.set(title=f"After the last step: {' or '.join(map(str, counts))} seeds", xlim=(-0.5, len(found) - 0.3))
    ends.set_xticks(range(len(found)), _titles(found), fontsize=9)
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def _titles(found: Sequence[Series]) -> list[str]:
    """What runs are called, with the rate where that alone tells them apart."""
    every = [series.title for series in found]
    return [
        series.title if every.count(series.title) == 1 else f"{series.title}\nlr {series.flags['lr']}"
        for series in found
    ]


def _curve(axes: Axes, series: Series, title: str, color: str) -> None:
    # Without the first loss, which is the same for all and far above.
    steps = sorted({step for losses in series.losses.values() for step in losses if step})
    columns = [[losses[step] for losses in series.losses.values() if step in losses] for step in steps]
    means = [fmean(column) for column in columns]
    deviations = [deviation(column) for column in columns]
    axes.errorbar(steps, means, deviations, label=title.replace("\n", ", "), color=color, capsize=2, linewidth=1.5)


def _random_from(series: Series) -> float | None:
    """The step from which bases are random."""
    if not series.flags["optimizer"].startswith("golore"):
        return None
    ratio = series.flags["rand_ratio"]
    return int(series.flags["num_training_steps"]) * (0.8 if ratio == "None" else float(ratio))


def _left_in(folder: Path) -> tuple[dict[str, str], dict[int, float], float | None]:
    """Flags of a run, held-out losses by step, and seconds of a step."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        run: dict[str, str] = results["run"]
        _ = [run[name] for name in USED]
        losses = {int(step): float(each["loss"]) for step, each in results["held_out"].items()}
        _, path = max(losses), folder / "figures.json"
        return run, losses, json.loads(path.read_text(encoding="utf-8"))["seconds_per_step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: got no results there, expected those of pretrain.py. Leave the folder out.") from None


if __name__ == "__main__":
    sys.exit(entry(main))
