"""What ranks run in test_fsdp_faults.py: a rank that dies, or stops, in a round of sharded blocks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import fsdp_block_cases as cases
import models
import torch.distributed as dist
from fsdp_block_cases import PERIOD, Case

from colossal_bcd.engine.failures import TIMEOUT
from colossal_bcd.fsdp.torch_private import ShardGroup


def lost(where: str, folder: str, stop: bool) -> None:
    """Rank 1 is killed, or stopped, before it comes to a round; the other one raises."""
    if stop:
        os.environ[TIMEOUT] = "8"
    model, optimizer, engine = Case(mode="ascending").attached()

    def die(*args: Any) -> None:
        if dist.get_rank() == 1:
            (Path(folder) / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP if stop else signal.SIGKILL)

    for step in range(PERIOD):
        if step == PERIOD - 1:
            if where == "gather of weights":
                die()
            if where == "average of gradients":
                ShardGroup._note = lambda self, note=ShardGroup._note: (  # type: ignore
                    self.params[0].requires_grad and die(),
                    note(self),
                )[1]
            if where == "norm of gradients":
                engine._scale_gradients = lambda scale=engine._scale_gradients: (die(), scale())[1]  # type: ignore
            if where == "switch of blocks":
                engine.agree = lambda agree=engine.agree: (die(), agree())[1]  # type: ignore
        models.loss(model, cases.batch(step, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
