"""Lion (Chen et al., arXiv 2302.06675, algorithm 2): no rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.math import lion_direction_
from colossal_bcd.optim.options import Storage, require, require_betas
from colossal_bcd.optim.register import register
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec
from colossal_bcd.sharding import Lazy, Number, Rounds, View


@dataclass(frozen=True)
class LionHyper(Storage):
    """Hyper-parameters of one param group; names and meaning are those of lion_pytorch."""

    lr: float = 1e-4
    """Step size: every value moves by it."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Share of the average in the sign, and its decay."""
    weight_decay: float = 0.0
    """Decoupled: before the update the weight shrinks by lr * weight_decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr >= 0, "lr", self.lr, "a non-negative number")
        require_betas(self.betas)
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a non-negative number")


def lion(view: View, state: State, hyper: LionHyper) -> Rounds:
    """One Lion update; asks for nothing."""
    share, decay_share = (1 - beta for beta in hyper.betas)
    sign = Lazy(finite_sign_, state["exp_avg"], view.stored_grad, share=share, decay_share=decay_share)
    yield from view.subtract(sign, lr=hyper.lr, decay=hyper.lr * hyper.weight_decay)


def finite_sign_(exp_avg: Tensor, grad: Tensor, *, share: Number, decay_share: Number) -> Tensor:
    """`lion_direction_`, which is no number where the average is none."""
    # torch's sign of NaN is 0, which would hide it; nothing times NaN or infinity is NaN.
    return lion_direction_(exp_avg, grad, share=share, decay_share=decay_share).add_(exp_avg, alpha=0.0)


@register("Lion", replaces={"lion_pytorch.Lion": {"decoupled_wd": False}}, low_rank=True)
class Lion(ShardedOptimizer[LionHyper]):
    """Lion on any mesh, without communication; its hyper-parameters are those of `LionHyper`."""

    hyper_type = LionHyper
    temporary_bytes = 4
    stacks = True

    def state_spec(self, layout: Shaped, hyper: LionHyper) -> dict[str, StateSpec]:
        return {"exp_avg": replace(StateSpec.like(layout), bits=hyper.moment_bits)}

    def update(self, view: View, state: State, hyper: LionHyper) -> Rounds:
        return lion(view, state, hyper)
