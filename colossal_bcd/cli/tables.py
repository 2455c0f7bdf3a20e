"""What commands show: tables, and a plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from colossal_bcd.cli.budget import CARDS, GB, ROWS, Budget

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def gigabytes(num_bytes: int) -> str:
    """GB of 10^9 bytes."""
    return f"{num_bytes / GB:.2f}"


def show_budget(console: Console, found: Budget) -> None:
    """One GPU's bytes in the two moments that can be the largest, what they fit on, and what travels."""
    job = found.job
    console.print(
        f"[bold]{job.model.name}[/bold]: {_count(found.parameters)} parameters, {_count(found.trained)} train at once"
    )
    console.print(f"{job.optimizer} on {job.mesh}")
    kind = "gradient checkpointing" if job.checkpointing else "no gradient checkpointing"
    console.print(f"{job.precision}, {job.batch} x {job.length} tokens, {kind}")
    table = Table(title="GB on one GPU")
    table.add_column("")
    for name in ("forward and backward", "optimizer step"):
        table.add_column(name, justify="right")
    for name in ROWS:
        table.add_row(name, *(gigabytes(getattr(each, name)) for each in (found.passes, found.step)))
    table.add_section()
    totals = [gigabytes(each.total) for each in (found.passes, found.step)]
    table.add_row("total", *totals, style="bold")
    console.print(table)
    cards = ", ".join(f"{card} GB {'[green]yes[/green]' if found.fits[card] else '[red]no[/red]'}" for card in CARDS)
    console.print(f"peak {gigabytes(found.peak)} GB; fits on {cards}")
    sent = {name: each for name, each in found.traffic.items() if each.collectives}
    if not sent:
        console.print("a step sends nothing")
    for name, each in sent.items():
        size = f"{gigabytes(each.bytes)} GB" if each.bytes >= GB // 100 else f"{each.bytes / 1000:,.1f} kB"
        console.print(f"a step sends {name}: {each.collectives} collective{'s' * (each.collectives > 1)}, {size}")


def show_comparison(console: Console, found: Sequence[Budget]) -> None:
    """A row for each optimizer."""
    job = found[0].job
    console.print(f"[bold]{job.model.name}[/bold]: {_count(found[0].parameters)} parameters, {job.mesh}")
    table = Table(title="GB on one GPU when it needs most")
    table.add_column("")
    for each in found:
        table.add_column(each.job.optimizer, justify="right")
    most = [max((each.passes, each.step), key=lambda one: one.total) for each in found]
    for name in ROWS:
        table.add_row(name, *(gigabytes(getattr(each, name)) for each in most))
    table.add_section()
    table.add_row("peak", *(gigabytes(each.peak) for each in found), style="bold")
    cards = [next((f"{card} GB" for card in CARDS if each.fits[card]), "none") for each in found]
    table.add_row("smallest card", *cards)
    table.add_row("sent in a step", *(gigabytes(sum(one.bytes for one in each.traffic.values())) for each in found))
    console.print(table)


def show_blocks(console: Console, found: Mapping[str, Any]) -> None:
    """The blocks in the order in which "ascending" trains them; equal neighbours share a line."""
    table = Table(title=f"{found['model']['name']}: {len(found['blocks'])} blocks")
    for name in ("block", "of", "tensors", "parameters", "share"):
        table.add_column(name, justify="left" if name == "of" else "right")
    numbered = enumerate(found["blocks"])
    for _, group in itertools.groupby(numbered, lambda each: (each[1]["tensors"], each[1]["parameters"])):
        (first, block), *rest = group
        last, end = rest[-1] if rest else (first, block)
        numbers = str(first) if last == first else f"{first} to {last}"
        name = block["name"] if last == first else f"{block['name']} ... {end['name']}"
        share = block["parameters"] / found["model"]["parameters"]
        table.add_row(numbers, name, str(block["tensors"]), f"{block['parameters']:,}", f"{share:.1%}")
    console.print(table)
    frozen = found["in_no_block"]
    if frozen:
        names = ", ".join(list(frozen)[:4]) + (", ..." if len(frozen) > 4 else "")
        console.print(f"in no block, and so frozen: {sum(frozen.values()):,} parameters ({names})")


def show_parameters(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each parameter."""
    table = Table()
    for name in ("parameter", "layout", "rounds", "bytes"):
        number = name in ("rounds", "bytes")
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(row["parameter"], row["layout"], str(row["rounds"]), f"{row['bytes']:,}")
    rules = ", ".join(dict.fromkeys(f"{row['rule']} with lr {row['lr']:g}" for row in rows))
    table.caption, table.caption_justify = rules, "left"
    console.print(table)
    total = sum(row["bytes"] for row in rows)
    console.print(f"{len(rows)} parameters, {total:,} bytes of state and masters on one GPU")


def show_rows(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Names and values."""
    console.print(title, style="bold")
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def plot(found: Sequence[Budget], path: Path) -> None:
    """Stacked bars of the bytes when each needs most, with the common cards as lines.

    Raises:
        ValueError: matplotlib does not know the kind of file.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError("--plot needs matplotlib. Run: pip install 'colossal_bcd[cli]'") from None
    figure = Figure(figsize=(1.4 * len(found) + 3.2, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = [each.job.optimizer for each in found]
    most = [max((each.passes, each.step), key=lambda one: one.total) for each in found]
    bottoms = [0.0] * len(found)
    for name, colour in zip(ROWS, COLOURS, strict=True):
        heights = [getattr(each, name) / GB for each in most]
        axes.bar(labels, heights, bottom=bottoms, label=name, color=colour, width=0.6)
        bottoms = [sum(pair) for pair in zip(bottoms, heights, strict=True)]
    top = max(bottoms) * 1.12
    for index, height in enumerate(bottoms):
        axes.text(index, height + top * 0.01, f"{height:.1f}", ha="center", va="bottom", fontweight="bold")
    for card in [card for card in CARDS if card < top]:
        axes.axhline(card, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
        axes.annotate(
            f"{card} GB", (1.0, card), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            va="center", color="0.4", fontsize=8,
        )  # fmt: skip
    job = found[0].job
    axes.set_ylim(0, top)
    axes.set_ylabel("GB on one GPU")
    axes.set_title(f"{job.model.name}, {job.mesh}, {job.batch} x {job.length} tokens", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def _count(number: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.2f} {word}"
    return str(number)
