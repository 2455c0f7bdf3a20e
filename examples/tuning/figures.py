"""What the steps of a run need: seconds, bytes of tensors, bytes sent, and the memory of the process."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from colossal_bcd.block.trained import trained_of
from colossal_bcd.testing import CollectiveCounter, live_bytes, storages


class StepFigures:
    """Measures the steps of one rank.

    Bytes of tensors are those that are alive when the base optimizer has stepped in the first step of a block: weights,
    and masters, states and gradients of what trains.  The walk over all tensors does not count as a step's time.

    Args:
        model: what the booster returned.
        optimizer: as it was made.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.seconds: list[float] = []
        """Of each step."""
        self._processor_seconds: list[float] = []
        self._sent, self._step_bytes, self._device = 0, 0, next(model.parameters()).device
        self._blocks, self._block, self._walk = set[str](), "", (0.0, 0.0)
        base: Any = getattr(optimizer, "base_optimizer", None) or trained_of(optimizer).base_optimizer
        base.register_step_post_hook(self._after_step)

    @contextmanager
    def step(self, block: str) -> Iterator[None]:
        """Measure a step, in which `block` trains."""
        self._block, self._walk = block, (0.0, 0.0)
        began = time.monotonic(), time.process_time()
        with CollectiveCounter() as counter:
            yield
        self.seconds.append(time.monotonic() - began[0] - self._walk[0])
        self._processor_seconds.append(time.process_time() - began[1] - self._walk[1])
        self._sent += sum(counter.bytes.values())

    def found(self, formula: int | None) -> dict[str, Any]:
        """Figures of the steps so far; bytes are those of the rank that has most.

        Args:
            formula: what the bytes of tensors should be on this rank.
        """
        steps = max(len(self.seconds), 1)
        most = torch.tensor([peak_bytes(), self._step_bytes, formula or 0, self._sent // steps], device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        peak, step_bytes, by_formula, sent = most.tolist()
        return {
            "ranks": dist.get_world_size(),
            "seconds_per_step": median(self.seconds) if self.seconds else None,
            "processor_seconds_per_step": median(self._processor_seconds) if self.seconds else None,
            "peak_bytes": peak,
            "step_bytes": step_bytes or None,
            "step_bytes_by_formula": None if formula is None else by_formula,
            "sent_bytes_per_step": sent if self.seconds else None,
        }

    def _after_step(self, *ignored: Any) -> None:
        if self._block in self._blocks:
            return
        began = time.monotonic(), time.process_time()
        self._blocks.add(self._block)
        self._step_bytes = max(self._step_bytes, live_bytes())
        self._walk = time.monotonic() - began[0], time.process_time() - began[1]


def formula_of(model: nn.Module, engine: Any) -> int:
    """The bytes that `StepFigures` measures as `estimate` says, of the block that needs most.

    Args:
        model: what the booster returned.
        engine: its optimizer.
    """
    from colossal_bcd.booster import estimate

    found = estimate(engine)
    # Under FSDP2 the estimate has the weights, too, as they are then divided.
    weights = getattr(found, "weights", None)
    if weights is None:
        weights = sum(storages([*model.parameters(), *model.buffers()]).values())
    return int(weights) + found.between_steps + found.step_gradients


def perplexity(loss: float) -> float:
    """Its exponential; infinite where that is more than a float has, as of a run that diverges."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def peak_bytes() -> int:
    """Largest memory so far: of the device, or on CPUs of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
