"""What `--tensorboard` writes: losses and speed of each step, and what the optimizer says of recorded ones."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

from report import Point
from settings import Settings, SettingsError


class Events:
    """Writes events on the first rank; the others only take part in what needs all of them.

    Args:
        settings: of the run.
        rank: of this process.
        taken: steps before this run; events of later ones, which an interrupted run has left, do not count any more.
    """

    def __init__(self, settings: Settings, rank: int, taken: int) -> None:
        self._asked, self._writer = settings.tensorboard is not None, None
        if self._asked and rank == 0:
            # It imports tensorboard, which is not needed otherwise.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(settings.tensorboard), purge_step=taken + 1)

    def recording(self, optimizer: Any, due: bool) -> contextlib.AbstractContextManager[None]:
        """Around a step: record it, if it is due."""
        return optimizer.recording() if self._asked and due else contextlib.nullcontext()

    def add(self, point: Point, rate: float, optimizer: Any, recorded: bool) -> None:
        """Write a step; all ranks call this.

        Args:
            point: step, losses and block.
            rate: tokens per second.
            optimizer: that made the step.
            recorded: whether the step was.
        """
        if not self._asked:
            return
        scalars = (
            {f"optimizer/{name}": value for name, value in optimizer.metrics().scalars().items()} if recorded else {}
        )
        if self._writer is None:
            return
        scalars |= {"loss/train": point.loss, "loss/held_out": point.held_out, "tokens_per_second": rate}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, point.step)
        if recorded:
            self._writer.add_text("block", point.block, point.step)

    def close(self) -> None:
        """Write what waits."""
        if self._writer is not None:
            self._writer.close()


def require_tensorboard() -> None:
    """Refuse to begin without the package.

    Raises:
        SettingsError: it is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise SettingsError(
            "--tensorboard needs the package tensorboard, which is not installed. Run pip install tensorboard, or "
            "pip install -e '.[examples]'."
        )
