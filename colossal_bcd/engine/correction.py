"""Corrections of inactive blocks from averaged gradients, in the same sequence of buckets as the active block's.

One sequence, because ranks whose gradients become ready in different orders would pair collectives of two sequences on
one process group differently.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.correction.correction import CorrectionState, require_open
from colossal_bcd.engine.reducer import GradientReducer, ReducerConfig, _Bucket


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """How inactive parameters get their gradients."""

    corrector: CorrectionState
    by_pipeline: bool
    """Whether a pipeline's passes, ended by `finish`, are a micro-batch, instead of one backward pass."""
    tied: Set[Parameter]
    """Tied across pipeline stages: ColossalAI adds up their gradients itself, at the end of the passes."""
    loss_scale: Callable[[], float] | None
    """Factor of the loss, under which gradients may overflow; None: there is none."""
    tp_group: dist.ProcessGroup | None
    """Ranks with other parts of the same buckets; None: there are none."""


class CorrectingReducer(GradientReducer):
    """Averages of two kinds: those of the active parameters are kept, those of inactive ones applied and freed.

    The correction of a bucket happens when the next one of its kind starts, so that a collective overlaps backward and
    at most two buckets exist.  Micro-batches before the last one leave no collective: their gradients wait on each rank
    in bfloat16.

    Args:
        active: parameters whose averages are wanted.
        corrected: parameters whose weights are updated here; in buckets of their own.
        order: all of them in model order, the same on every rank.
        config: of the active ones; inactive ones are averaged in full on every rank.  Without `overlap` collectives
            start within backward all the same, where gradients are freed, and those of inactive ones are waited for.
        corrections: see `CorrectionConfig`.
    """

    def __init__(
        self,
        active: Sequence[Parameter],
        corrected: Sequence[Parameter],
        order: Sequence[Parameter],
        config: ReducerConfig,
        corrections: CorrectionConfig,
    ) -> None:
        self._corrected, self._corrections = frozenset(corrected), corrections
        self._waiting: dict[Parameter, Tensor] = {}
        self._together: dict[Parameter, Tensor] = {}
        self._flying: deque[_Bucket] = deque()
        self._overflow: list[Tensor] = []
        self._finite: Tensor | None = None
        self._passes, self._final, self._applied, self._loss_scale = 0, False, False, 1.0
        chosen = self._corrected.union(active)
        self._in_flight = 1 if config.overlap and math.prod(config.sizes) > 1 else 0
        super().__init__([param for param in order if param in chosen], replace(config, overlap=True))

    @property
    def checked(self) -> list[Tensor]:
        return [*self.grads.values(), *self._overflow]

    @property
    def pristine(self) -> bool:
        return super().pristine and not self._waiting and self._passes == 0

    @property
    def unfinished(self) -> bool:
        return self.incomplete or super().unfinished

    def begin(self, synced: bool) -> None:
        if self._passes == 0:
            self._overflow = []
        if self._corrections.loss_scale is not None:
            self._loss_scale = self._corrections.loss_scale()
        super().begin(synced)
        if self._corrections.by_pipeline:
            self._require_open()
        else:
            self._count(synced)

    def finish(self) -> None:
        if self._corrections.by_pipeline:
            self._count(synced=True)
        super().finish()
        self._applied = self._final
        self._final = False

    @property
    def incomplete(self) -> bool:
        """Whether a step has begun whose declared number of micro-batches has not come yet."""
        return self._passes > 0 and not self._applied

    def close(self) -> None:
        """Average and correct what there is as if the last micro-batch had come, and begin the next step."""
        self._final = True
        super().finish()
        self.start_over()

    def settle(self) -> None:
        self.take_back()
        if self.unfinished:
            self.close()
        self.start_over()

    def clear(self) -> None:
        self._waiting.clear()
        for param in self._corrected:
            param.grad = None
        self.start_over()
        super().clear()

    def start_over(self) -> None:
        """The next gradient is the first one of a step."""
        self._passes, self._final, self._applied = 0, False, False

    def _count(self, synced: bool) -> None:
        """Another micro-batch; the last one of a step if it is the declared number, or the first with collectives."""
        self._require_open()
        self._passes += 1
        self._final = synced and self._passes >= self._corrections.corrector.accumulation_steps

    def _require_open(self) -> None:
        if self._applied:
            require_open(self._passes + 1, self._passes, "the engine")

    def _reset(self) -> None:
        super()._reset()
        self._flying.clear()

    def _is_partitioned(self, param: Parameter) -> bool:
        return param not in self._corrected and super()._is_partitioned(param)

    def _kind(self, param: Parameter) -> tuple[object, ...]:
        return *super()._kind(param), param in self._corrected

    def _is_corrected(self, bucket: _Bucket) -> bool:
        return bucket.params[0] in self._corrected

    def _is_ready(self, bucket: _Bucket) -> bool:
        return super()._is_ready(bucket) or (self._is_corrected(bucket) and not self._final)

    def _on_grad(self, param: Parameter) -> None:
        if param not in self._corrected or self._final:
            super()._on_grad(param)
        elif param not in self._corrections.tied:
            assert param.grad is not None
            self._waiting[param] = self._corrections.corrector.wait(param.grad, self._waiting.get(param))
            param.grad = None

    def _launch(self) -> None:
        bucket = self._buckets[self._next]
        if not self._is_corrected(bucket):
            super()._launch()
            return
        if not self._final:
            self._next += 1
            return
        for param in bucket.params:
            if param in self._waiting:
                waiting = self._waiting.pop(param).to(param.dtype)
                param.grad = waiting if param.grad is None else waiting.add_(param.grad)
        super()._launch()
        self._flying.append(bucket)
        while len(self._flying) > self._in_flight:
            self._receive_next()

    def _receive(self, bucket: _Bucket) -> None:
        """Corrected buckets arrive in the order in which they were sent, and may have arrived before."""
        if not self._is_corrected(bucket):
            super()._receive(bucket)
        elif self._flying and bucket is self._flying[0]:
            self._receive_next()

    def _receive_next(self) -> None:
        bucket = self._flying.popleft()
        self._finite = None if self._corrections.loss_scale is None else self._check(bucket)
        super()._receive(bucket)
        if self._together:
            gradients, self._together = self._together, {}
            self._correct(gradients)

    def _check(self, bucket: _Bucket) -> Tensor:
        """Scalar bool: whether no rank that holds a part of the bucket found an overflow; the same on all of them."""
        if bucket.handle is not None:
            bucket.handle.wait()
        parts = [bucket.buffer] if bucket.buffer is not None else [p.grad for p in bucket.params if p.grad is not None]
        device = bucket.params[0].device
        largest = [part.abs().amax().float() for part in parts if part is not None and part.numel()]
        finite = torch.stack([*largest, torch.zeros((), device=device)]).isfinite().all().float()
        if self._corrections.tp_group is not None:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self._corrections.tp_group)
        self._overflow.append(torch.where(finite > 0, 0.0, torch.inf))
        return finite > 0

    def _add(self, param: Parameter, grad: Tensor) -> None:
        if param not in self._corrected:
            super()._add(param, grad)
        elif self._corrections.corrector.by_bucket:
            self._together[param] = grad
        else:
            self._correct({param: grad})

    def _correct(self, gradients: Mapping[Parameter, Tensor]) -> None:
        self._corrections.corrector.apply(gradients, loss_scale=self._loss_scale, finite=self._finite)
