"""Progress: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

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
        self._live = console.is_terminal and not console.quiet
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("loss {task.fields[losses]}"),
            TextColumn("[cyan]{task.fields[block]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._live,
            # Drawn by `show`: a drawing thread would run while the memory probe looks at live objects.
            auto_refresh=False,
        )
        self._held_out = "-"
        self._task = self._progress.add_task("", total=self._steps, losses="-", block="", rate="-")

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
            self._held_out = f"{point.held_out:.3f}"
        if self._live:
            losses = f"{point.loss:.3f}, held-out {self._held_out}"
            fields: dict[str, Any] = {"losses": losses, "block": point.block, "rate": f"{rate:,.0f}"}
            self._progress.update(self._task, completed=point.step, refresh=True, **fields)
        elif point.held_out is not None or point.step % max(self._steps // LINES, 1) == 0:
            held_out = "" if point.held_out is None else f", held-out {point.held_out:.3f}"
            line = f"step {point.step:>4}/{self._steps}  loss {point.loss:.3f}{held_out}"
            self._console.print(f"{line}  {point.block}  {rate:,.0f} tokens/s")
