"""A table of runs: what is held out, and what the machine measured.

python examples/tuning/comparison.py glue_runs/*
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
def main(folders: tuple[Path, ...]) -> None:
    """Print the results of FOLDERS, outputs of runs, as a table in Markdown; what has none is left out."""
    try:
        click.echo("\n".join(table([folder for folder in folders if (folder / "results.json").is_file()])))
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def table(folders: list[Path]) -> list[str]:
    """Lines of the table; a run has the figures after its last step.

    Raises:
        ValueError: no folder has results, or runs were of different figures.
    """
    if not folders:
        raise ValueError("got no folder with results.json, expected outputs of runs. Give these.")
    runs = {folder: _read(folder, "results") for folder in folders}
    first = runs[folders[0]]
    names = list(first["held_out"]["0"])
    rows = [
        ["run", "steps", *(f"held-out {name}" for name in names), "ranks", "seconds per step", "peak MiB of a rank"]
    ]
    rows.append(["---"] * len(rows[0]))
    if constant := first.get("constant"):
        figures = [f"{constant[name]:.3f}" if name in constant else "-" for name in names]
        rows.append(["one answer for all", "0", *figures, "-", "-", "-"])
    for folder, run in runs.items():
        step, held_out = max(run["held_out"].items(), key=lambda pair: int(pair[0]))
        if list(held_out) != names:
            raise ValueError(f"{folder}: got figures {', '.join(held_out)}, expected {', '.join(names)}. Leave it out.")
        machine = _read(folder, "figures")
        seconds = "-" if machine["seconds_per_step"] is None else f"{machine['seconds_per_step']:.2f}"
        peak = f"{machine['peak_bytes'] / 2**20:.0f}"
        rows.append(
            [folder.name, step, *(f"{held_out[name]:.3f}" for name in names), str(machine["ranks"]), seconds, peak]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
