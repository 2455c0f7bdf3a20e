"""Figures of a run: bytes in the step against the formula, collectives per step, peak memory of the process."""

from __future__ import annotations

import resource
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from settings import LOW_RANK, Settings
from torch import nn

from colossal_bcd.testing import CollectiveCounter, live_bytes

NUM_MOMENTS = {"adamw": 2, "lamb": 2, "came": 1, "adafactor": 0}
"""Values that an optimizer keeps for every parameter."""


@dataclass
class Traffic:
    """Collectives of several steps, by kind."""

    steps: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, counter: CollectiveCounter) -> None:
        self.steps += 1
        self.calls.update(counter.calls)
        self.bytes.update(counter.bytes)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of all tensors of this rank inside a step of the base optimizer."""

    block: str
    num_active: int
    """Parameters on this rank that were trained in the step."""
    measured: int
    expected: int


class MemoryProbe:
    """Step hook of the base optimizer; measures the first step of each block.

    At that moment everything of a step is alive: weights, and masters, states and gradients of what is active.

    Args:
        settings: of the run.
        model: the model on this rank.
        baseline: bytes that were alive before the model was built.
    """

    def __init__(self, settings: Settings, model: nn.Module, baseline: int) -> None:
        self.results: dict[str, StepMemory] = {}
        self.num_parameters = sum(param.numel() for param in model.parameters())
        self._settings, self._model, self._baseline = settings, model, baseline
        self._block, self._num_data_bytes = "", 0

    def expect(self, block: str, num_data_bytes: int) -> None:
        """Tell which block the next step trains, and how many bytes the batch has, which do not count."""
        self._block, self._num_data_bytes = block, num_data_bytes

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._block in self.results:
            return
        num_active = sum(param.numel() for param in self._model.parameters() if param.requires_grad)
        self.results[self._block] = StepMemory(
            block=self._block,
            num_active=num_active,
            measured=live_bytes() - self._baseline - self._num_data_bytes,
            expected=expected_bytes(self._settings, self.num_parameters, num_active) + self._low_rank_bytes(optimizer),
        )

    def _low_rank_bytes(self, optimizer: torch.optim.Optimizer) -> int:
        """Bytes of the states of an optimizer that projects: they follow from rank and shapes, not from a count."""
        if self._settings.optimizer not in LOW_RANK:
            return 0
        entries = (entry for state in optimizer.state.values() for entry in state.values())
        return sum(entry.nbytes for entry in entries if isinstance(entry, torch.Tensor))

    @property
    def largest(self) -> StepMemory:
        """The step that needed most."""
        return max(self.results.values(), key=lambda result: result.expected)


def expected_bytes(settings: Settings, num_parameters: int, num_active: int) -> int:
    """Weights, plus master, moments and float32 gradient of what is active, over the ZeRO ranks: 16 bytes with AdamW.

    Float32 weights that no rank shares are their own masters: 4 bytes less.  Rows and columns of factored moments, a
    hundredth of what they stand for or less, do not count.  Low-rank states come on top.
    """
    own_master = settings.precision == "fp32" and settings.zero_ranks == 1
    weights = (4 if settings.precision == "fp32" else 2) * num_parameters
    each = 4 * (1 + NUM_MOMENTS.get(settings.base, 0)) + (0 if own_master else 4)
    if settings.gather_images:
        # Parts of the weights and their gradients, in the weights' dtype.
        each = 2 * (4 if settings.precision == "fp32" else 2)
    return weights + each * num_active // settings.zero_ranks


def peak_bytes() -> int:
    """Largest resident memory of this process so far, or of its GPU's allocator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """What one rank measured."""

    memory: StepMemory
    num_parameters: int
    peak: int
    ordinary: Traffic
    """Steps between switches."""
    switching: Traffic
    """Steps at whose end the block changed."""
