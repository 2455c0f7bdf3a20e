"""Progress: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType

from report import Point
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from settings import Settings

LINES = 16
"""Lines that a whole run prints where there is no terminal."""


class Screen:
    """Shows loss, active block and tokens per second of each step."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self._console, self._steps = console, settings.steps
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("loss {task.fields[loss]:.3f}  held-out {task.fields[held_out]:.3f}"),
            TextColumn("[cyan]{task.fields[block]}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._held_out = float("nan")
        self._task = self._progress.add_task(
            "", total=self._steps, loss=self._held_out, held_out=self._held_out, block="", rate=0.0
        )

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, point: Point, rate: float) -> None:
        """Show one step.

        Args:
            point: step, losses and block.
            rate: tokens per second.
        """
        if point.held_out is not None:
            self._held_out = point.held_out
        if self._console.is_terminal:
            self._progress.update(
                self._task, completed=point.step, loss=point.loss, held_out=self._held_out, block=point.block, rate=rate
            )
        elif point.held_out is not None or point.step % max(self._steps // LINES, 1) == 0:
            held_out = "" if point.held_out is None else f"  held-out {point.held_out:.3f}"
            line = f"step {point.step:>4}/{self._steps}  loss {point.loss:.3f}{held_out}"
            self._console.print(f"{line}  {point.block}  {rate:,.0f} tokens/s")
