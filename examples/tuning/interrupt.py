"""Ctrl-C on many ranks: they agree to stop after the same step, so none is left waiting for another."""

from __future__ import annotations

import os
import time
from types import FrameType


class StopRequest:
    """Signal handler.  Outside of training, or when asked again later, the process ends at once.

    Attributes:
        training: whether somebody looks at `received` after each step.
        received: whether a signal came while training.
    """

    def __init__(self) -> None:
        self.training = False
        self.received = False
        self._since = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Terminal and launcher both send a signal for one Ctrl-C, so what follows within a second is the same request.
        if not self.training or (self.received and time.monotonic() - self._since > 1):
            os._exit(128 + number)
        if not self.received:
            self.received, self._since = True, time.monotonic()


stop_request = StopRequest()
