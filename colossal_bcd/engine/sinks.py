"""Where averages go that no step takes: corrections of inactive parameters, within backward.

They travel in the reducer's one sequence of buckets, because ranks whose gradients become ready in different orders
would pair collectives of two sequences on one process group differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.correction.correction import CorrectionState, require_open


class MicroBatches:
    """Counts the micro-batches of a step, to say which is the last one.

    Args:
        declared: micro-batches of a step, 1 or more.
        by_pipeline: a pipeline's passes, ended by `end`, are one, instead of one backward pass.

    Attributes:
        count: those of the step so far.
        is_last: whether the pass that is under way is the last one: the declared number, or the first one with
            collectives after that.
    """

    def __init__(self, declared: int, *, by_pipeline: bool) -> None:
        self._declared, self._by_pipeline = declared, by_pipeline
        self.start_over()

    def start_over(self) -> None:
        """The next gradient is the first one of a step."""
        self.count, self.is_last, self._is_over = 0, False, False

    def begin(self, *, synced: bool) -> None:
        """Start of a backward pass, whose gradients are averaged if `synced`.

        Raises:
            ValueError: the last one of this step has been.
        """
        if self._is_over:
            require_open(self.count + 1, self.count, "the engine")
        if not self._by_pipeline:
            self._add(synced=synced)

    def end(self) -> None:
        """End of a pass with collectives, before the last of them start."""
        if self._by_pipeline:
            if self._is_over:
                require_open(self.count + 1, self.count, "the engine")
            self._add(synced=True)

    def ended(self) -> None:
        """All collectives of a pass have been."""
        self._is_over, self.is_last = self.is_last, False

    @property
    def incomplete(self) -> bool:
        """Whether a step has begun whose declared number of micro-batches has not come yet."""
        return self.count > 0 and not self._is_over

    def _add(self, *, synced: bool) -> None:
        self.count += 1
        self.is_last = synced and self.count >= self._declared


@dataclass(frozen=True, kw_only=True)
class ApplyConfig:
    """How inactive parameters are corrected."""

    correction: CorrectionState
    by_pipeline: bool = False
    """See `MicroBatches`."""
    tied: Set[Parameter] = frozenset()
    """Tied across pipeline stages: the host adds up their gradients itself, at the end of the passes."""
    loss_scale: Callable[[], float] | None = None
    """Factor of the loss, under which gradients may overflow; None: there is none."""
    tp_group: dist.ProcessGroup | None = None
    """Ranks with other parts of the same buckets; None: there are none."""


class Apply:
    """Sink whose averages update weights at once and are freed.

    Micro-batches before the last one leave no collective: their gradients wait on each rank in bfloat16.

    Args:
        params: parameters whose weights are updated; in buckets of their own, averaged in full on every rank.
        config: see `ApplyConfig`.

    Attributes:
        micro_batches: of the step that is under way.
        overflow: scalars, infinite for buckets of this step that had an overflow.
    """

    def __init__(self, params: Iterable[Parameter], config: ApplyConfig) -> None:
        self.params, self._config, self._correction = frozenset(params), config, config.correction
        self.micro_batches = MicroBatches(config.correction.accumulation_steps, by_pipeline=config.by_pipeline)
        self.overflow: list[Tensor] = []
        self._waiting: dict[Parameter, Tensor] = {}
        self._loss_scale = 1.0

    @property
    def is_alone(self) -> bool:
        """Whether an update needs no other rank and no other parameter of its bucket."""
        return not (self._correction.by_bucket and self._config.tp_group is not None)

    @property
    def pristine(self) -> bool:
        """Whether no micro-batch of the coming step has begun."""
        return not self._waiting and self.micro_batches.count == 0

    def begin(self, *, synced: bool) -> None:
        """Start of a backward pass."""
        if self.micro_batches.count == 0:
            self.overflow = []
        if self._config.loss_scale is not None:
            self._loss_scale = self._config.loss_scale()
        self.micro_batches.begin(synced=synced)

    def postpone(self, param: Parameter) -> None:
        """Let a gradient wait for those of the next micro-batches."""
        if param not in self._config.tied:
            assert param.grad is not None
            self._waiting[param] = self._correction.wait(param.grad, self._waiting.get(param))
            param.grad = None

    def bring_back(self, params: Iterable[Parameter]) -> None:
        """Add what has waited to the gradients of the last micro-batch."""
        for param in params:
            if param in self._waiting:
                waiting = self._waiting.pop(param).to(param.dtype)
                param.grad = waiting if param.grad is None else waiting.add_(param.grad)

    def take(self, averages: Iterator[tuple[Parameter, Tensor]], raw: Sequence[Tensor], device: torch.device) -> None:
        """Update the weights of a bucket.

        Args:
            averages: parameter and flat average, made one by one.
            raw: all values of the bucket as they were averaged.
            device: of the bucket.
        """
        finite = None if self._config.loss_scale is None else self._check(raw, device)
        if self._correction.by_bucket:
            gradients = dict(averages)
            if gradients:
                self._correction.apply(gradients, loss_scale=self._loss_scale, finite=finite)
            return
        for param, grad in averages:
            self._correction.apply({param: grad}, loss_scale=self._loss_scale, finite=finite)
            del grad

    def clear(self) -> None:
        """Forget gradients that wait."""
        self._waiting.clear()
        for param in self.params:
            param.grad = None
        self.micro_batches.start_over()

    def _check(self, raw: Sequence[Tensor], device: torch.device) -> Tensor:
        """Scalar bool: whether no rank with a part of the bucket found an overflow; the same on all of them."""
        largest = [values.abs().amax().float() for values in raw if values.numel()]
        finite = torch.stack([*largest, torch.zeros((), device=device)]).isfinite().all().float()
        if self._config.tp_group is not None:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self._config.tp_group)
        self.overflow.append(torch.where(finite > 0, 0.0, torch.inf))
        return finite > 0
