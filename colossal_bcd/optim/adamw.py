"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2): no rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.math import adam_direction_, debiased_rate, direction_numbers, moment_numbers
from colossal_bcd.optim.options import OPTIONAL, RoundingOptions, Storage, require, require_adam
from colossal_bcd.optim.register import register
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec, require_no_capture
from colossal_bcd.sharding import Lazy, Rounds, View, wide

Order = Literal["torch", "bitsandbytes", "galore"]


@dataclass(frozen=True)
class AdamWRule(RoundingOptions):
    """What the rule reads; `AdamWHyper` adds how the first moment is stored."""

    lr: float = 1e-3
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 1e-2
    """Decoupled: the weight shrinks by lr * weight_decay."""
    _: KW_ONLY
    correct_bias: bool = field(default=True, metadata=OPTIONAL)
    """Debias both moments."""
    order: Order = field(default="torch", metadata=OPTIONAL)
    """Whose order of operations: "torch" shrinks the weight before the step and adds `eps` to the debiased root;
    "bitsandbytes" shrinks it after the step; "galore", galore_torch's, also adds `eps` before it debiases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_adam(self.lr, self.betas, self.eps, self.weight_decay)
        orders = ("torch", "bitsandbytes", "galore")
        require(self.order in orders, "order", self.order, f"one of {', '.join(orders)}")


@dataclass(frozen=True)
class AdamWHyper(AdamWRule, Storage):
    """Hyper-parameters of one param group."""


def adamw(view: View, state: State, hyper: AdamWRule) -> Rounds:
    """One AdamW update; asks for nothing."""
    lr, debias = hyper.lr, state.step if hyper.correct_bias else None
    if debias is not None and hyper.order == "galore":
        lr, debias = debiased_rate(lr, debias, hyper.betas), None
    numbers = {**moment_numbers(hyper.betas), **direction_numbers(hyper.betas, hyper.eps, debias)}
    direction = Lazy(adam_direction_, state["exp_avg"], state["exp_avg_sq"], view.stored_grad, **numbers)
    decay = hyper.lr * hyper.weight_decay
    yield from view.subtract(direction, lr=lr, decay=decay, decay_first=hyper.order == "torch")


@register("AdamW")
class AdamW(ShardedOptimizer[AdamWHyper]):
    """AdamW on any mesh, without communication; its hyper-parameters are those of `AdamWHyper`."""

    hyper_type = AdamWHyper
    temporary_bytes = 4
    stacks = True

    def state_spec(self, layout: Shaped, hyper: AdamWHyper) -> dict[str, StateSpec]:
        moment = StateSpec.like(layout)
        return {"exp_avg": replace(moment, bits=hyper.moment_bits), "exp_avg_sq": moment}

    def update(self, view: View, state: State, hyper: AdamWHyper) -> Rounds:
        return adamw(view, state, hyper)

    def is_fused(self, hyper: AdamWHyper, dtype: torch.dtype) -> bool:
        plain = hyper.order == "torch" and hyper.correct_bias and hyper.moment_bits == 32
        # Neither a subclass with a rule of its own, nor that of low-rank gradients, is what torch's kernel computes.
        return type(self).update is AdamW.update and plain and wide(dtype) == dtype

    def update_fused(self, values: Mapping[str, list[Tensor]], step: int, hyper: AdamWHyper) -> None:
        require_no_capture("the number of the step")
        weights = values["weight"]
        steps = [torch.full((), step, dtype=torch.float32, device=weights[0].device)] * len(weights)
        torch._fused_adamw_(
            weights,
            values["grad"],
            values["exp_avg"],
            values["exp_avg_sq"],
            [],
            steps,
            lr=hyper.lr,
            beta1=hyper.betas[0],
            beta2=hyper.betas[1],
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            amsgrad=False,
            maximize=False,
        )
