"""Time a step against the number of tensors that the same values are divided into, on one process.

    python benchmarks/tensors.py
    python benchmarks/tensors.py --optimizer came --number 100 --number 1000

Every number of tensors is ten times the one before by default, and each tensor a tenth.  The time per tensor is the
slope between a number and the one before: what Python and the launch of operations take.  The first step also plans
and allocates.  All numbers and sides take their steps in turn; no GPU is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import click
import torch
from common import Measured, Table, environment, in_turn, ratio, to_file
from originals import CONTESTS, FUSED, fused_adamw
from torch import Tensor, nn

HEADER = (
    "optimizer", "tensors", "of values", "time / time of the number before", "processor time", "ms", "processor ms",
    "processor us per tensor", "first step, processor ms",
)  # fmt: skip
ALONE = (FUSED, *(name for name in CONTESTS if name != "badam"))
"""Of blocks, only some tensors would train."""
COLUMNS = 256


class Side:
    """An optimizer over equal matrices.

    Args:
        name: of the contest whose side is ours, or that of torch's fused AdamW.
        number: of matrices.
        values: in all of them together.
        compiled: whether ours gets compile=True.
    """

    def __init__(self, name: str, number: int, values: int, compiled: bool) -> None:
        rows = max(values // (number * COLUMNS), 1)
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(rows, COLUMNS, generator=generator)) for _ in range(number)]
        self._grads: list[Tensor] = [torch.randn(rows, COLUMNS, generator=generator) for _ in self.params]
        named = [(f"layers.{index}.weight", param) for index, param in enumerate(self.params)]
        options: dict[str, Any] = {"compile": True} if compiled and name != FUSED else {}
        self.optimizer = (
            fused_adamw(self.params) if name == FUSED else CONTESTS[name].ours(named, COLUMNS // 16, **options)
        )
        self.give_gradients()
        begin = process_time()
        self.optimizer.step()
        self.first = process_time() - begin

    def give_gradients(self) -> None:
        """The same in every step."""
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad.clone()


def rows(name: str, numbers: Sequence[int], values: int, steps: int, warm_up: int, compiled: bool) -> list[list[Any]]:
    """Rows of one optimizer, one for each number of tensors."""
    sides = {str(number): Side(name, number, values, compiled) for number in numbers}
    found = in_turn(
        {key: side.optimizer.step for key, side in sides.items()},
        steps,
        warm_up,
        lambda key, step: sides[key].give_gradients(),
    )
    made: list[list[Any]] = []
    before: tuple[int, Measured] | None = None
    for key, side in sides.items():
        number, taken = int(key), found[key]
        told = ["-", "-", "-"]
        if before is not None:
            slope = 1000 * (taken.cpu_ms - before[1].cpu_ms) / (number - before[0])
            told = [ratio(taken.ms / before[1].ms), f"{taken.cpu_ms / before[1].cpu_ms:.2f}", f"{slope:.1f}"]
        times = [f"{taken.ms:.2f}", f"{taken.cpu_ms:.2f}", told[2], f"{1000 * side.first:.1f}"]
        made.append([f"{name}{', compiled' * compiled}", number, side.params[0].numel(), *told[:2], *times])
        before = number, taken
    return made


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--optimizer", "optimizers", type=click.Choice(ALONE), multiple=True, help="[default: all]")
@click.option(
    "--number", "numbers", type=click.IntRange(1), multiple=True, default=(75, 750, 7500), help="Of tensors; several."
)
@click.option("--values", type=click.IntRange(256), default=7_000_000, help="In all tensors together.")
@click.option("--compile", "compiled", is_flag=True, help="Pass compile=True to ours.")
@click.option("--steps", type=click.IntRange(1), default=7, help="Measured steps of each number.")
@click.option("--warm-up", type=click.IntRange(1), default=2, help="Steps before these, after the first one.")
@to_file
def main(
    optimizers: Sequence[str],
    numbers: Sequence[int],
    values: int,
    compiled: bool,
    steps: int,
    warm_up: int,
    output: Path | None,
) -> None:
    """Print one markdown table."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    about = (
        f"{environment()} {values / 1e6:.1f} M values in matrices of {COLUMNS} columns, GaLore at rank {COLUMNS // 16} "
        f"between refreshes. Medians of {steps} steps after {warm_up + 1} of warm-up."
    )
    table = Table(about, HEADER, output)
    for name in optimizers or ALONE:
        for line in rows(name, sorted(numbers), values, steps, warm_up, compiled):
            table.add(line)


if __name__ == "__main__":
    main()
