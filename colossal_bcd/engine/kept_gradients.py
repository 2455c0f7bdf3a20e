"""Averaged gradients that a ZeRO step leaves where they are, so that they accumulate until `zero_grad`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.engine.reducer import GradientReducer


class KeptGradients:
    """The averages of one step, as ColossalAI's gradient store and torch keep them.

    Args:
        wanted: whether steps keep gradients; else they are used up, which frees them as early as possible.
        max_norm: by which steps clip; 0: not at all.
    """

    def __init__(self, *, wanted: bool, max_norm: float) -> None:
        self.wanted = wanted
        self._max_norm = max_norm
        self._held: dict[Parameter, Tensor] = {}
        self._scale = 1.0

    def begin(self, reducer: GradientReducer, loss_scale: float) -> None:
        """Start of a backward pass: gradients of earlier passes get its loss scale."""
        if loss_scale != self._scale and reducer.grads:
            torch._foreach_mul_(list(reducer.grads.values()), loss_scale / self._scale)
        self._scale = loss_scale

    def take(self, reducer: GradientReducer) -> None:
        """Hold the averages before masters get them."""
        if self.wanted:
            self._held = dict(reducer.grads)

    @torch.no_grad()
    def give_back(self, reducer: GradientReducer, masters: Mapping[Parameter, Tensor], norm: Tensor | None) -> None:
        """After the rule: put the averages back, clipped where masters have the gradients' dtype, as ColossalAI does.

        Args:
            reducer: whose `grads` the step has emptied.
            masters: by parameter, with the gradients that the rule has taken.
            norm: scalar, of the step's gradients before clipping.
        """
        held, self._held = self._held, {}
        shared, others = list[Tensor](), list[Tensor]()
        for param, average in held.items():
            grad = masters[param].grad
            if grad is None or grad.dtype != average.dtype:
                continue
            same = grad.untyped_storage().data_ptr() == average.untyped_storage().data_ptr()
            (shared if same else others).append(average)
        if shared and self._scale != 1:
            torch._foreach_mul_(shared, self._scale)
        if others and self._max_norm > 0 and norm is not None:
            torch._foreach_mul_(others, (self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        reducer.grads.update(held)
