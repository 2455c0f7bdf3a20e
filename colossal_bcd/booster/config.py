"""What a plugin decides for its optimizer, and its loss scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from torch import Tensor

from colossal_bcd.booster.low_rank import LowRankOptions

Groups = tuple[dist.ProcessGroup, ...]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What a plugin decides for its optimizer."""

    data_groups: Groups
    """The data-parallel group, or the groups whose product it is (extra_dp_size)."""
    zero_groups: Groups
    """Ranks that share masters and states: `data_groups` at stage 1 and 2, empty at stage 0."""
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    partition_grad: bool = False
    """Stage 2: gradients are sharded, too."""
    reduce_bucket_size: int = 12 * 2**20
    """Values in one gradient or weight collective."""
    communication_dtype: torch.dtype | None = None
    overlap_communication: bool = True
    overlap_allgather: bool = False
    cpu_offload: bool = False
    master_weights: bool = True
    max_norm: float = 0.0
    """Clip the global norm of the gradients of what is active; 0 does not."""
    low_rank: LowRankOptions = field(default_factory=LowRankOptions)
    """How gradients of projected parameters travel."""
    fp16: Mapping[str, float] | None = None
    """Arguments of the loss scaler; None is no loss scaling."""


class LossScaler(FP16MixedPrecisionMixin):
    """ColossalAI's dynamic loss scaling, looking for overflow in the engine's gradients."""

    def __init__(self, gradients: Callable[[], list[Tensor]], **kwargs: float) -> None:
        super().__init__(**kwargs)
        self._gradients = gradients

    def check_local_overflow(self) -> bool:
        grads = [grad for grad in self._gradients() if grad.numel()]
        return bool(grads) and not bool(torch.stack([grad.abs().amax().float() for grad in grads]).isfinite().all())
