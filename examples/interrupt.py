"""Ctrl-C on many ranks: they agree to stop after the same step, so none is left waiting for another."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """Signal handler.  Outside of training, or when asked twice, the process ends at once.

    Attributes:
        training: whether somebody looks at `received` after each step.
        received: whether a signal came while training.
    """

    def __init__(self) -> None:
        self.training = False
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes SIGTERM on after the terminal's SIGINT: that is still the first request.
        if not self.training or (self.received and number == signal.SIGINT):
            os._exit(128 + number)
        self.received = True


stop_request = StopRequest()
