"""Answers from the device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


class LateFlag:
    """A flag that is found on the device during a step and read on the host one step later."""

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._sent: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def add(self, flag: Tensor) -> None:
        """Set the flag of this step where `flag`, a scalar bool, is set."""
        self._flag = flag if self._flag is None else self._flag | flag

    def send(self) -> None:
        """End of the step."""
        flag, self._flag, self._event = self._flag, None, None
        self._sent = flag
        if flag is not None and flag.device.type == "cuda":
            self._sent = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> bool:
        """Whether the flag was set in the step before."""
        if self._event is not None:
            self._event.synchronize()
        return self._sent is not None and bool(self._sent)
