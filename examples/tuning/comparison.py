"""Tables and a picture of runs: what is held out, and what the machine measured.

python examples/tuning/comparison.py instruct_runs/* --plot instruct_runs/comparison.png
python examples/tuning/comparison.py instruct_runs/* --originals
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

HEADER = (
    "ranks", "seconds per step", "of the processor", "tensors in a step, MiB", "by formula, MiB", "sent per step, MiB",
    "peak MiB of a rank",
)  # fmt: skip


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="A picture to write of the runs, too.")
@click.option("--originals", is_flag=True, help="Compare runs with those of originals that have the same flags.")
def main(folders: tuple[Path, ...], plot: Path | None, originals: bool) -> None:
    """Print the results of FOLDERS, outputs of runs, as a table in Markdown; what has none is left out."""
    try:
        runs = [Results.read(folder) for folder in folders if (folder / "results.json").is_file()]
        click.echo("\n".join(table_of_originals(runs) if originals else table(runs)))
        if plot is not None:
            draw(runs, plot)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@dataclass(frozen=True)
class Results:
    """What a run has left."""

    name: str
    flags: dict[str, str]
    losses: list[float]
    """Of each step."""
    held_out: dict[int, dict[str, float]]
    """Figures by the number of steps before."""
    constant: dict[str, float]
    """Figures of one answer for all, where the program knows them."""
    machine: dict[str, Any]
    """Figures of the machine."""

    @classmethod
    def read(cls, folder: Path) -> Results:
        run, machine = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("results", "figures")
        )
        held_out = {int(step): figures for step, figures in run["held_out"].items()}
        losses = list(run["losses"].values())
        return cls(folder.name, run["run"], losses, held_out, run.get("constant", {}), machine)

    @property
    def steps(self) -> int:
        """Before the last figures."""
        return max(self.held_out)

    @property
    def last(self) -> dict[str, float]:
        return self.held_out[self.steps]


def table(runs: list[Results]) -> list[str]:
    """Lines of the table; a run has the figures after its last step.

    Raises:
        ValueError: no folder has results, or runs were of different figures.
    """
    names = names_of(runs)
    rows = [["run", "steps", *(f"held-out {name}" for name in names), *HEADER]]
    rows.append(["---"] * len(rows[0]))
    if constant := runs[0].constant:
        figures = [f"{constant[name]:.3f}" if name in constant else "-" for name in names]
        rows.append(["one answer for all", "0", *figures, *["-"] * len(HEADER)])
    for run in runs:
        machine = run.machine
        rows.append(
            [
                run.name,
                str(run.steps),
                *(f"{run.last[name]:.3f}" for name in names),
                str(machine["ranks"]),
                _number(machine["seconds_per_step"]),
                _number(machine["processor_seconds_per_step"]),
                *(_mib(machine[f"{name}_bytes{end}"]) for name, end in BYTES),
            ]
        )
    return _lines(rows)


BYTES = (("step", ""), ("step", "_by_formula"), ("sent", "_per_step"), ("peak", ""))


def names_of(runs: list[Results]) -> list[str]:
    """Names of the figures that all runs have.

    Raises:
        ValueError: there is no run, or one has others.
    """
    if not runs:
        raise ValueError("got no folder with results.json, expected outputs of runs. Give these.")
    names = list(runs[0].last)
    for run in runs:
        if list(run.last) != names:
            got, expected = ", ".join(run.last), ", ".join(names)
            raise ValueError(f"{run.name}: got figures {got}, expected {expected}. Leave it out.")
    return names


def table_of_originals(runs: list[Results]) -> list[str]:
    """Lines of a table with a row for every original among the runs, beside ours of the same flags.

    Raises:
        ValueError: there is no original, or not exactly one of ours with its flags.
    """
    names = names_of(runs)
    rows = [
        [
            "method", "steps", *(f"held-out {name}, ours / original's" for name in names),
            "largest difference of a step's loss", "seconds of the processor per step", "ratio",
            "tensors in a step, MiB", "ratio", "peak MiB", "ratio",
        ]
    ]  # fmt: skip
    rows.append(["---"] * len(rows[0]))
    for original in runs:
        if original.flags["implementation"] == "original":
            ours = _ours(original, runs)
            cells = [original.flags["method"], str(original.steps)]
            cells += [f"{ours.last[name]:.4f} / {original.last[name]:.4f}" for name in names]
            cells.append(f"{max(abs(a - b) for a, b in zip(ours.losses, original.losses, strict=True)):.1e}")
            for name, unit in (("processor_seconds_per_step", 1), ("step_bytes", 2**20), ("peak_bytes", 2**20)):
                got, other = ours.machine[name] / unit, original.machine[name] / unit
                digits = 3 if unit == 1 else 1
                cells += [f"{got:.{digits}f} / {other:.{digits}f}", f"{got / other:.2f}"]
            rows.append(cells)
    if len(rows) == 2:
        raise ValueError("got no run with --implementation original, expected one or more. Give their folders, too.")
    return _lines(rows)


def _ours(original: Results, runs: list[Results]) -> Results:
    found = [run for run in runs if run.flags == {**original.flags, "implementation": "ours"}]
    if len(found) != 1:
        raise ValueError(
            f"{original.name}: got {len(found)} runs of ours with its flags, expected 1. Run the program with the same "
            "flags but --implementation, and give that folder."
        )
    return found[0]


def draw(runs: list[Results], path: Path) -> None:
    """Draw the first held-out figure over steps, and beside it the bytes of tensors in a step.

    Raises:
        ValueError: as of `table`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    name = names_of(runs)[0]
    # Lines and bars have the order in which the lines end, so that colours are not all that tells them apart.
    ordered = sorted(runs, key=lambda run: run.last[name], reverse=True)
    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[3, 2])
    for index, run in enumerate(ordered):
        colour = colormaps["tab20"](index * 2 % 20 + index // 10)
        points = sorted((step, figures[name]) for step, figures in run.held_out.items())
        label = f"{run.name}  {run.last[name]:.3f}"
        curves.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.5, label=label)
        bars.barh(index, (run.machine["step_bytes"] or 0) / 2**20, color=colour, height=0.7)
        if (formula := run.machine["step_bytes_by_formula"]) is not None:
            bars.plot(formula / 2**20, index, "|", color="black", markersize=16)
    curves.set(xlabel="optimizer steps", ylabel=f"held-out {name}")
    curves.legend(frameon=False, fontsize=9)
    bars.set_yticks(range(len(ordered)), [run.name for run in ordered])
    bars.invert_yaxis()
    bars.set(xlabel="tensors of a rank in a step, MiB\nbar: measured, line: by formula")
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def _lines(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    main()
