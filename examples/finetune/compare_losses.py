"""Compare the losses of two runs: `python examples/finetune/compare_losses.py a.csv b.csv --bound 0.01`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def read_losses(path: Path) -> dict[tuple[str, int], float]:
    """(column, step) -> loss."""
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (column, int(row["step"])): float(row[column])
            for row in csv.DictReader(file)
            for column in ("loss", "held_out")
            if row[column]
        }


def largest_difference(
    first: dict[tuple[str, int], float], second: dict[tuple[str, int], float]
) -> tuple[float, str, int]:
    """(absolute difference, column, step) where two runs differ most.

    Raises:
        ValueError: the runs do not have the same steps.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError(
            f"the runs have {len(first)} and {len(second)} losses, or other steps; expected the same steps"
        )
    differences = {key: abs(first[key] - second[key]) for key in first}
    column, step = max(differences, key=lambda key: differences[key])
    return differences[column, step], column, step


@click.command()
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@click.option("--bound", type=click.FloatRange(0), default=0.0, show_default=True, help="Largest allowed difference.")
def main(first: Path, second: Path, bound: float) -> None:
    """Print the largest difference between the losses of two runs; fail if it is larger than the bound."""
    try:
        difference, column, step = largest_difference(read_losses(first), read_losses(second))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    verdict = "within" if difference <= bound else "TOO LARGE"
    click.echo(f"largest difference {difference:.3g} ({column}, step {step}), bound {bound:g}: {verdict}")
    sys.exit(0 if difference <= bound else 1)


if __name__ == "__main__":
    main()
