"""LAMB (You et al., arXiv 1904.00962, algorithm 2): one round, two scalars per parameter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.math import (
    debiased_rate,
    direction_numbers,
    moment_direction,
    moment_numbers,
    update_moments_,
)
from colossal_bcd.optim.options import Storage, require, require_adam
from colossal_bcd.optim.register import register
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec
from colossal_bcd.sharding import Lazy, Number, Rounds, ShardView
from colossal_bcd.sharding.lazy import add_

BiasCorrection = Literal[True, False, "step_size"]


@dataclass(frozen=True)
class LambHyper(Storage):
    """Hyper-parameters of one param group."""

    lr: float = 1e-3
    """Step size before the trust ratio."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Part of the direction, so it counts in the trust ratio."""
    bias_correction: BiasCorrection = True
    """True debiases the moments (the published algorithm); False does not (the paper's third version); "step_size"
    multiplies lr by sqrt(1 - beta2^t) / (1 - beta1^t) after the trust ratio, as ColossalAI's classes do."""
    adam: bool = False
    """A trust ratio of 1 for every parameter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_adam(self.lr, self.betas, self.eps, self.weight_decay)
        require(
            isinstance(self.bias_correction, bool) or self.bias_correction == "step_size",
            "bias_correction",
            self.bias_correction,
            'True, False or "step_size"',
        )


def lamb(view: ShardView, state: State, hyper: LambHyper) -> Rounds:
    """One LAMB update.  The norms are of the whole parameter, the weight's from the values that are updated.

    The direction of what is larger than a chunk is computed twice, before and after the round, and not kept meanwhile.
    """
    debias, lr = state.step if hyper.bias_correction is True else None, hyper.lr
    if hyper.bias_correction == "step_size":
        lr = debiased_rate(lr, state.step, hyper.betas)
    moments = state["exp_avg"], state["exp_avg_sq"]
    numbers = {"weight_decay": hyper.weight_decay, **direction_numbers(hyper.betas, hyper.eps, debias)}
    first = Lazy(first_direction_, *moments, view.param, view.stored_grad, **moment_numbers(hyper.betas), **numbers)
    if hyper.adam:
        yield from view.subtract(first, lr=lr)
        return
    kept = first.kept()
    weight, length = yield view.norms_of_update(kept)
    ratio = torch.where((weight > 0) & (length > 0), weight.sqrt() / length.sqrt(), torch.ones_like(weight))
    # Once the gradients are zeros the direction shrinks to 1e-39 and its ratio grows past float32; its root does not.
    root = ratio.sqrt_().to(moments[0].dtype)
    if isinstance(kept, Lazy):
        kept = Lazy(lamb_direction, *moments, view.param, factor=root, **numbers)
    else:
        kept.mul_(root)
    yield from view.subtract(kept, lr=lr * root)


def lamb_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    *,
    weight_decay: Number,
    factor: Number | None = None,
    **numbers: Number,
) -> Tensor:
    """Algorithm 2, line 9, r = m / (sqrt(v) + eps), and line 10's r + lambda * x, times a factor, in a new tensor."""
    direction = add_(weight, moment_direction(exp_avg, exp_avg_sq, **numbers), scale=weight_decay)
    return direction if factor is None else direction.mul_(factor)


def first_direction_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    grad: Tensor,
    *,
    share1: Number,
    keep2: Number,
    share2: Number,
    **numbers: Number,
) -> Tensor:
    """`lamb_direction` after `update_moments_`."""
    update_moments_(exp_avg, exp_avg_sq, grad, share1=share1, keep2=keep2, share2=share2)
    return lamb_direction(exp_avg, exp_avg_sq, weight, **numbers)


@register("Lamb")
class Lamb(ShardedOptimizer[LambHyper]):
    """LAMB on any mesh: one collective per axis, step and wave (see `wave_bytes`).

    Its hyper-parameters are those of `LambHyper`.
    """

    hyper_type = LambHyper
    temporary_bytes = 4
    stacks = True

    def state_spec(self, layout: Shaped, hyper: LambHyper) -> dict[str, StateSpec]:
        moment = StateSpec.like(layout)
        return {"exp_avg": replace(moment, bits=hyper.moment_bits), "exp_avg_sq": moment}

    def update(self, view: ShardView, state: State, hyper: LambHyper) -> Rounds:
        return lamb(view, state, hyper)

    def trust_direction(self, weight: Tensor, state: State, hyper: LambHyper) -> Tensor:
        """[n] what the trust ratio compares a weight with, of moments after the update; for `metrics`."""
        if hyper.adam:
            return weight
        numbers = direction_numbers(hyper.betas, hyper.eps, state.step if hyper.bias_correction is True else None)
        moments = state["exp_avg"], state["exp_avg_sq"]
        return lamb_direction(*moments, weight, weight_decay=hyper.weight_decay, **numbers)
