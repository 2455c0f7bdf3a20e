"""Stochastic gradient descent with momentum, as in torch.optim.SGD (MSGD of arXiv 2410.11289): no rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.math import heavy_ball_, nesterov, nesterov_
from colossal_bcd.optim.options import OPTIONAL, Storage, require
from colossal_bcd.optim.register import register
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec, require_no_capture
from colossal_bcd.sharding import Lazy, Rounds, View, wide
from colossal_bcd.sharding.lazy import unchanged


@dataclass(frozen=True)
class SGDHyper(Storage):
    """Hyper-parameters of one param group; names and meaning are those of torch.optim.SGD."""

    lr: float = 1e-3
    """Step size."""
    momentum: float = 0.0
    """Decay of the momentum buffer, which starts as the first gradient; 0 keeps none."""
    dampening: float = 0.0
    """Part of every later gradient that does not enter the buffer."""
    weight_decay: float = 0.0
    """Multiple of the weight that is added to its gradient."""
    nesterov: bool = False
    """Step along gradient + momentum * buffer instead of along the buffer."""
    _: KW_ONLY
    decoupled_weight_decay: bool = field(default=False, metadata=OPTIONAL)
    """Instead of that the weight shrinks by lr * weight_decay after the update, as in galore_torch's SGD; the low-rank
    forms know this decay only, as a projected gradient has no value for each value of the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr >= 0, "lr", self.lr, "a non-negative number")
        require(self.momentum >= 0, "momentum", self.momentum, "a non-negative number")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a non-negative number")
        plain = not self.nesterov or (self.momentum > 0 and self.dampening == 0)
        require(plain, "nesterov", self.nesterov, "False, or a positive momentum and a dampening of 0")
        require(
            self.momentum > 0 or self.moment_bits == 32,
            "moment_bits",
            self.moment_bits,
            "32 where momentum is 0, which keeps no buffer",
        )


def sgd(view: View, state: State, hyper: SGDHyper) -> Rounds:
    """One step of SGD; asks for nothing."""
    decoupled, grad = hyper.decoupled_weight_decay, view.stored_grad
    if hyper.weight_decay and not decoupled:
        grad = grad.to(wide(grad.dtype)).add(view.weight.param, alpha=hyper.weight_decay)
    direction = Lazy(unchanged, grad)
    if hyper.momentum:
        buffer, momentum = state["momentum_buffer"], hyper.momentum
        if state.is_first:
            # Torch's first buffer is the gradient itself, whatever the dampening.
            buffer.copy_(grad)
            direction = Lazy(nesterov, buffer, grad, momentum=momentum) if hyper.nesterov else Lazy(unchanged, buffer)
        elif hyper.nesterov:
            direction = Lazy(nesterov_, buffer, grad, momentum=momentum)
        else:
            direction = Lazy(heavy_ball_, buffer, grad, momentum=momentum, share=1 - hyper.dampening)
    decay = hyper.lr * hyper.weight_decay if decoupled else 0.0
    yield from view.subtract(direction, lr=hyper.lr, decay=decay, decay_first=False)


@register("SGD")
class SGD(ShardedOptimizer[SGDHyper]):
    """SGD on any mesh, without communication; its hyper-parameters are those of `SGDHyper`."""

    hyper_type = SGDHyper
    temporary_bytes = 8
    stacks = True
    momentum_entry = "momentum_buffer"

    def state_spec(self, layout: Shaped, hyper: SGDHyper) -> dict[str, StateSpec]:
        return {"momentum_buffer": replace(StateSpec.like(layout), bits=hyper.moment_bits)} if hyper.momentum else {}

    def update(self, view: View, state: State, hyper: SGDHyper) -> Rounds:
        return sgd(view, state, hyper)

    def is_fused(self, hyper: SGDHyper, dtype: torch.dtype) -> bool:
        plain = not (hyper.decoupled_weight_decay and hyper.weight_decay) and hyper.moment_bits == 32
        # Neither a subclass with a rule of its own, nor that of low-rank gradients, is what torch's kernel computes.
        return type(self).update is SGD.update and plain and wide(dtype) == dtype

    def update_fused(self, values: Mapping[str, list[Tensor]], step: int, hyper: SGDHyper) -> None:
        is_first = hyper.momentum > 0 and step == 1
        if is_first:
            require_no_capture("whether the step is the first")
        torch._fused_sgd_(
            values["weight"],
            values["grad"],
            values.get("momentum_buffer", []),
            lr=hyper.lr,
            momentum=hyper.momentum,
            dampening=hyper.dampening,
            weight_decay=hyper.weight_decay,
            nesterov=hyper.nesterov,
            maximize=False,
            is_first_step=is_first,
        )
