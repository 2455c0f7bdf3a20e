"""What the benchmark programs share: a table and its file, sides that take turns, the machine, a small Llama.

Every program prints a line that names environment and sizes, and below it one markdown table, whose first column of
numbers is the ratio.  `--output` writes both to a file, of which `page.py` makes docs/benchmarks.md.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_bcd.testing import CollectiveCounter

# The text that ships with CPython and its batches are those of the main example.
sys.path.append(str(Path(__file__).parents[1] / "examples" / "finetune"))

ONE_STREAM = {"overlap_communication": False}
"""ColossalAI's overlap needs streams, which a CPU has not; ours does without as well, then."""
HYBRID = {"tp_size": 2, "pp_size": 1, "max_norm": 0.0, **ONE_STREAM}


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A way to divide a model over gloo ranks of this machine."""

    num_ranks: int
    plugin: str
    """Name of the plugin's class, ColossalAI's and ours."""
    options: Mapping[str, Any]
    """What its constructor takes."""


MESHES = {
    "zero2 x2": Ranks(
        num_ranks=2, plugin="LowLevelZeroPlugin", options={"stage": 2, "precision": "bf16", **ONE_STREAM}
    ),
    # In fp32: of bf16 weights without ZeRO, ColossalAI takes every shard for a whole matrix, and sends nothing.
    "tp2 x2": Ranks(
        num_ranks=2, plugin="HybridParallelPlugin", options={**HYBRID, "zero_stage": 0, "precision": "fp32"}
    ),
    "tp2+zero2 x4": Ranks(
        num_ranks=4, plugin="HybridParallelPlugin", options={**HYBRID, "zero_stage": 2, "precision": "bf16"}
    ),
}
"""Meshes by the name that tables have."""


def environment(*packages: str) -> str:
    """The machine and the versions of some packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f} at the "
        f"start, one thread per rank, gloo; Python {platform.python_version()}, {versions}."
    )


def row(cells: Sequence[object]) -> str:
    """Cells as a line of a markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def heading(cells: Sequence[str]) -> str:
    """The first two lines of a markdown table."""
    return row(cells) + "\n" + row(["---"] * len(cells))


def ratio(value: float, digits: int = 2) -> str:
    """The number that a row is about."""
    return f"**{value:.{digits}f}**"


to_file = click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the table to this file, too, after every row.",
)
"""The option that every program has."""


class Table:
    """A table that is printed, and written to a file, row by row: a run that is stopped leaves what it has measured.

    Args:
        about: environment and sizes, one line.
        header: names of the columns.
        output: a file, or None.
    """

    def __init__(self, about: str, header: Sequence[str], output: Path | None) -> None:
        self._header, self._output = tuple(header), output
        self._lines = [about, "", *heading(header).split("\n")]
        click.echo("\n".join(self._lines))
        self._write()

    def add(self, cells: Sequence[object]) -> None:
        """Add a row."""
        assert len(cells) == len(self._header), cells
        self._lines.append(row(cells))
        click.echo(self._lines[-1])
        self._write()

    def _write(self) -> None:
        if self._output is not None:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._output.write_text("\n".join(self._lines) + "\n")


@dataclass(frozen=True)
class Written:
    """A table as a program wrote it."""

    about: str
    """Environment and sizes."""
    table: str
    """The markdown table."""
    rows: tuple[Mapping[str, str], ...]
    """Cells by column, without the stars of the ratio."""

    @classmethod
    def read(cls, text: str) -> Written:
        """Take apart what `Table` has written."""
        about, _, header, _, *lines = text.strip().splitlines()
        rows = [dict(zip(_cells(header), _cells(line), strict=True)) for line in lines]
        return cls(about, "\n".join(text.strip().splitlines()[2:]), tuple(rows))


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("| ").removesuffix(" |")
    return [cell.strip().replace("**", "").replace("\\|", "|") for cell in inner.split(" | ")]


def llama(hidden: int, layers: int, vocab: int = 1024, seed: int = 0, **options: Any) -> nn.Module:
    """A Llama with random weights that depend on the seed alone: the same on every rank and in every call."""
    torch.manual_seed(seed)
    sizes = {"intermediate_size": hidden * 11 // 4, "num_attention_heads": 4, "num_key_value_heads": 4, **options}
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=vocab,
        use_cache=False,
        attn_implementation="eager",
        **sizes,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one side took, step by step; over ranks the largest of each."""

    wall: tuple[float, ...]
    """Seconds by the clock."""
    cpu: tuple[float, ...]
    """Seconds of processor time: what is left of noise where ranks and other programs share cores."""
    collectives: int = 0
    """Calls of the last step of warm-up, on rank 0."""
    num_bytes: int = 0
    """What these calls sent: of each the larger buffer."""

    @property
    def ms(self) -> float:
        """Median milliseconds by the clock."""
        return 1000 * median(self.wall)

    @property
    def cpu_ms(self) -> float:
        """Median milliseconds of processor time."""
        return 1000 * median(self.cpu)


def in_turn(
    sides: Mapping[str, Callable[[], Any]],
    steps: int,
    warm_up: int,
    before: Callable[[str, int], Any] | None = None,
) -> dict[str, Measured]:
    """Time several pieces of work in turn, on one process or on all ranks, which begin together.

    Args:
        sides: work by name, the same names on every rank.
        steps: how often each is measured.
        warm_up: how often each is done before; at least once.
        before: called with the name and the number of the step, and not timed.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    counters = {name: CollectiveCounter() for name in sides}
    for step in range(warm_up + steps):
        for name, work in sides.items():
            if before is not None:
                before(name, step)
            if step == warm_up - 1:
                with counters[name]:
                    work()
                continue
            taken = _seconds(work)
            if step >= warm_up:
                times[name].append(taken)
    columns = {name: list(zip(*slowest(lines), strict=True)) for name, lines in times.items()}
    return {
        name: Measured(
            wall=wall, cpu=cpu, collectives=counters[name].total, num_bytes=sum(counters[name].bytes.values())
        )
        for name, (wall, cpu) in columns.items()
    }


def _seconds(work: Callable[[], Any]) -> list[float]:
    """Time by the clock and of the processor of this process."""
    if dist.is_initialized():
        dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return [time.perf_counter() - wall, time.process_time() - cpu]


def slowest(values: Sequence[Any]) -> Any:
    """The largest over the ranks of each number in a list, or in a list of lists of equal lengths."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
