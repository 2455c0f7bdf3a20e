"""Dynamic loss scaling of fp16 training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from torch import Tensor


class LossScaler(FP16MixedPrecisionMixin):
    """ColossalAI's dynamic loss scaling, looking for overflow in the engine's gradients."""

    def __init__(self, gradients: Callable[[], list[Tensor]], **kwargs: float) -> None:
        super().__init__(**kwargs)
        self._gradients = gradients

    def check_local_overflow(self) -> bool:
        grads = [grad for grad in self._gradients() if grad.numel()]
        return bool(grads) and not bool(torch.stack([grad.abs().amax().float() for grad in grads]).isfinite().all())
