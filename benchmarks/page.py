"""Run the benchmarks and make docs/benchmarks.md of their tables, with pictures.

    python benchmarks/page.py                          # all of them: 10 to 25 minutes
    python benchmarks/page.py --only switch            # one anew; the others as their tables, or the page, are
    python benchmarks/page.py --keep                   # none: the page again from the tables

Every program writes its table to a folder.  What the page says of targets is computed from the tables.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from common import Written, heading, row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from targets import SIZES, judged

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    command: tuple[str, ...]
    """Program and arguments."""
    text: str
    plot: Callable[[Written, Axes], None] | None = None


def plot_steps(written: Written, axes: Axes) -> None:
    """Bars of theirs / ours on one process, by optimizer and size."""
    rows = [each for each in written.rows if each["where"] in SIZES]
    pairs = dict.fromkeys((each["optimizer"], each["against"]) for each in rows)
    labels = ["\n".join([name, *re.split(r",? |(?<=_)", against)]) for name, against in pairs]
    for index, size in enumerate(SIZES):
        values = [float(each["theirs / ours, processor time"]) for each in rows if each["where"] == size]
        if values:
            axes.bar([at + 0.27 * (index - 1) for at in range(len(values))], values, 0.25, label=size, zorder=2)
    axes.axhline(1, color="black", linewidth=1, zorder=3)
    axes.set_yscale("log")
    axes.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set(ylabel="theirs / ours, processor time", title="Inner steps on one process; above 1 ours is faster")
    axes.legend()


def plot_tensors(written: Written, axes: Axes) -> None:
    """Lines of time over the number of tensors."""
    for name in dict.fromkeys(each["optimizer"] for each in written.rows):
        points = [
            (int(each["tensors"]), float(each["processor ms"])) for each in written.rows if each["optimizer"] == name
        ]
        style = "k--" if name.startswith("torch") else "o-"
        axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tensors, the same values in all", ylabel="processor ms of a step")
    numbers = sorted({int(each["tensors"]) for each in written.rows})
    axes.minorticks_off()
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_title("A step against the number of tensors")
    axes.legend(fontsize=8)


def plot_memory(written: Written, axes: Axes) -> None:
    """Bars of bytes beside AdamW's on the first mesh."""
    rows = [each for each in written.rows if each["mesh"] == written.rows[0]["mesh"]]
    for index, column in enumerate(("between steps / AdamW's", "in a step / AdamW's")):
        values = [0.0 if each[column] == "-" else float(each[column]) for each in rows]
        axes.bar([at + 0.4 * (index - 0.5) for at in range(len(rows))], values, 0.38, label=column, zorder=2)
    axes.axhline(1, color="black", linewidth=1, zorder=3)
    axes.set_xticks(range(len(rows)), [each["optimizer"].replace(", ", ",\n") for each in rows], fontsize=8)
    axes.set(ylabel="bytes / AdamW's", title=f"Bytes of a rank beyond the weights, {rows[0]['mesh']}")
    axes.legend()


SECTIONS: Mapping[str, Section] = {
    "step": Section(
        "Optimizer steps",
        ("step.py",),
        "On one process ours, the originals and torch's fused AdamW update the same tensors; torch's own AdamW and "
        "SGD are there as they are by default, on lists of tensors (foreach) and fused. On ranks ours runs under our "
        "plugin and theirs under ColossalAI's of the same "
        "name: an inner step is the base optimizer's on gradients that are there, a whole step that of the boosted "
        "optimizer after backward, with averages, masters and the gather of weights. GaLore's steps are those between "
        "refreshes, BAdam's those within a block. On ranks that share cores processor time has less noise than time by "
        'the clock. "Least by bytes moved" is what a kernel that reads and writes every value once would take, in '
        "AdamW's bytes.",
        plot_steps,
    ),
    "compiled": Section(
        "Compiled steps",
        ("step.py", "--size", "large", "--compile", "--optimizer", "lamb", "--optimizer", "came", "--optimizer",
         "adafactor", "--optimizer", "galore"),
        "The same on large tensors with `compile=True`, against torch's fused AdamW on the same values. GaLore's "
        "matrix products alone are the least that its step can take: on a CPU they need many more operations than "
        "bytes.",
    ),
    "sides": Section(
        "Weights of the originals",
        ("sides.py",),
        "How far weights are from those of the original on one process after the same gradients, and, where a run goes "
        "on from its files in new objects, from those of the run that went on; both as norms, by how far training "
        "moved the weights.",
    ),
    "tensors": Section(
        "The number of tensors",
        ("tensors.py",),
        "The same values in more and smaller tensors: what grows is Python and the launch of operations.",
        plot_tensors,
    ),
    "memory": Section(
        "Memory of a rank",
        ("memory.py",),
        "Bytes beyond the weights, measured by enumerating live storages. The estimate leaves out buckets on their way "
        "between ranks, which count in a step of a model as small as this one, and takes for temporaries all that "
        "rules may keep alive at once, of which a step may need less.",
        plot_memory,
    ),
    "traffic": Section(
        "Traffic of blocks and of low-rank gradients",
        ("traffic.py",),
        "What rank 0 sends in one training step. BAdam trains one block of D, GaLore reduces low-rank gradients, and "
        "may gather low-rank updates in the place of weights.",
    ),
    "switch": Section(
        "Switches of blocks",
        ("switch.py",),
        "A switch is what the step that ends with one takes longer than the others; a negative one is noise.",
    ),
    "refresh": Section(
        "Refreshes of GaLore's projectors",
        ("refresh.py",),
        "Above 1 the refresh in the first column is faster than the one that it is compared with. Subspace iteration "
        "loses energy on noise, whose spectrum has no gap, and next to none on real gradients.",
    ),
    "scale": Section(
        "One rank of a large job",
        ("scale.py",),
        "Shapes of Llama 3 405B. The other ranks are torch's fake process groups, so that what is sent is counted and "
        "does not travel; the rank steps on real tensors of its size. Construction begins with the whole model's "
        "parameters and ends with an optimizer that is bound to this rank's. Of GaLore, gradients are projected in the "
        "step here; under the plugins they are projected as they are reduced.",
    ),
}  # fmt: skip
"""In the order of the page, by the name of the table's file."""


def run(name: str, tables: Path) -> bool:
    """Run a program, which writes its table; whether it went through."""
    program, *arguments = SECTIONS[name].command
    begin = time.perf_counter()
    command = [sys.executable, str(HERE / program), *arguments, "--output", str(tables / f"{name}.md")]
    good = subprocess.run(command).returncode == 0
    click.echo(f"-- {name}: {'done' if good else 'FAILED'} after {time.perf_counter() - begin:.0f} s", err=True)
    return good


def draw(name: str, written: Written, folder: Path) -> str | None:
    """Make a section's picture; the link to it, or None."""
    plot = SECTIONS[name].plot
    if plot is None:
        return None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3, zorder=0)
    plot(written, axes)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110)
    return f"![{SECTIONS[name].title}]({folder.name}/{name}.png)"


def assembled(tables: Mapping[str, Written], pictures: Path) -> str:
    """The page."""
    lines = [
        "# Benchmarks",
        "",
        "`make bench` runs these programs one after the other and rewrites this page. Each has `--help`. Sides take",
        "turns in one run, times are medians, and the first number of a row is the ratio; on a shared machine ratios",
        "mean more than times. Figures of a GPU are in [benchmarks_gpu.md](benchmarks_gpu.md).",
        "",
        "## What was aimed at",
        "",
        heading(("target", "", "measured")),
        *map(row, judged(tables)),
    ]
    for name, section in SECTIONS.items():
        if name not in tables:
            continue
        command = " ".join(f'"{part}"' if " " in part else part for part in section.command)
        lines += ["", f"## {section.title}", "", "```", f"python benchmarks/{command}", "```", ""]
        lines += [*_wrapped(section.text), "", tables[name].about, "", tables[name].table]
        picture = draw(name, tables[name], pictures)
        lines += ["", picture] if picture else []
    return "\n".join(lines) + "\n"


def tables_of(page: str) -> dict[str, Written]:
    """Tables of a page that was assembled before, by section."""
    found = {}
    for name, section in SECTIONS.items():
        _, title, rest = page.partition(f"\n## {section.title}\n")
        lines = [line for line in rest.split("\n## ")[0].splitlines() if line]
        table = [line for line in lines if line.startswith("| ")]
        if title:
            about = lines[lines.index(table[0]) - 1]
            found[name] = Written.read("\n".join([about, "", *table]))
    return found


def _wrapped(text: str) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > 120:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--only", type=click.Choice(list(SECTIONS)), multiple=True, help="Run these alone.  [default: all]")
@click.option("--keep", is_flag=True, help="Run nothing.")
@click.option(
    "--tables", type=click.Path(file_okay=False, path_type=Path), default=Path("build/benchmarks"), help="Of tables."
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("docs/benchmarks.md"), help="The page."
)
def main(only: Sequence[str], keep: bool, tables: Path, output: Path) -> None:
    """Write the page."""
    if only and keep:
        raise click.UsageError(f"--keep: got --only {only[0]}, expected one of the two. Leave one out.")
    failed = [name for name in (() if keep else only or SECTIONS) if not run(name, tables)]
    written = tables_of(output.read_text()) if only and output.is_file() else {}
    paths = {name: tables / f"{name}.md" for name in SECTIONS}
    written |= {name: Written.read(path.read_text()) for name, path in paths.items() if path.is_file()}
    written = {name: table for name, table in written.items() if table.rows}
    if not written:
        raise click.UsageError(f"--tables: got {tables}, which has no table. Run without --keep.")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(assembled(written, output.parent / "pictures"))
    if failed:
        raise click.ClickException(f"{', '.join(failed)} failed; the page has what their tables have.")


if __name__ == "__main__":
    main()
