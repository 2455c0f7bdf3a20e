"""CAME (Luo et al., arXiv 2307.02047, algorithm 2): three rounds."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from colossal_bcd.optim.base import ShardedOptimizer
from colossal_bcd.optim.factored import (
    FactoredAverage,
    Root,
    factored_spec,
    is_factored,
    preconditioned,
    times,
    update_and_precondition_,
    update_average_,
)
from colossal_bcd.optim.options import Storage, require
from colossal_bcd.optim.register import register
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec
from colossal_bcd.sharding import Lazy, Number, Rounds, View


@dataclass(frozen=True)
class CAMEHyper(Storage):
    """Hyper-parameters of one param group."""

    lr: float
    """Step size."""
    eps: tuple[float, float] = (1e-30, 1e-16)
    """Added to the squared gradient and to the instability."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update before the step size."""
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    """Decay of the first moment, of the second, and of the instability."""
    weight_decay: float = 0.0
    """Decoupled: the weight shrinks by lr * weight_decay."""
    _: KW_ONLY
    min_dim_size_to_factor: int = 0
    """Matrices with a smaller dim keep the whole second moment, and no instability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr is not None and self.lr >= 0, "lr", self.lr, "a non-negative number")
        require(len(self.eps) == 2 and min(self.eps) >= 0, "eps", self.eps, "two non-negative numbers")
        require(self.clip_threshold > 0, "clip_threshold", self.clip_threshold, "a positive number")
        require(
            len(self.betas) == 3 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            self.betas,
            "three numbers in [0, 1)",
        )
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a non-negative number")
        require(self.min_dim_size_to_factor >= 0, "min_dim_size_to_factor", self.min_dim_size_to_factor, "0 or more")


def came(view: View, state: State, hyper: CAMEHyper) -> Rounds:
    """One CAME update; equation and line numbers are those of the paper's algorithm 2."""
    (eps1, eps2), (beta1, beta2, beta3) = hyper.eps, hyper.betas
    root: Root
    exp_avg, statistics = state["exp_avg"], view.statistics if "exp_avg_sq_row" in state else None
    # No variable holds what is asked for: a stack's gradients would stay alive.
    if statistics is not None:
        (means,) = yield (statistics.means(Lazy(torch.square, view.stored_grad)),)  # lines 5 and 6
        root = FactoredAverage(statistics, state, "exp_avg_sq").update_(means, eps1, 1 - beta2).inverse_root()
        (length,) = yield (view.square_sum(Lazy(preconditioned, view.stored_grad, *root)),)  # line 7
    else:
        root = (state["exp_avg_sq"],)
        asked = {"eps": eps1, "share": 1 - beta2}
        (length,) = yield (view.square_sum(Lazy(update_and_precondition_, *root, view.stored_grad, **asked)),)
    excess = ((length / max(view.numel, 1)).sqrt() / hyper.clip_threshold).clamp_(min=1)  # line 8
    root, factor = times(root, excess.reciprocal_().to(exp_avg.dtype))
    if statistics is not None:
        # Lines 9 to 12.
        (means,) = yield (statistics.means(Lazy(instability_, exp_avg, view.stored_grad, *root, share=1 - beta1)),)
        residual = FactoredAverage(statistics, state, "exp_avg_res").update_(means, eps2, 1 - beta3)
        step = Lazy(preconditioned, exp_avg, *residual.inverse_root())  # lines 13 and 14
    else:
        step = Lazy(update_average_, exp_avg, view.stored_grad, *root, share=1 - beta1, **factor)
    yield from view.subtract(step, lr=hyper.lr, decay=hyper.lr * hyper.weight_decay)


def instability_(exp_avg: Tensor, grad: Tensor, row: Tensor, col: Tensor, *, share: Number) -> Tensor:
    """Squared distance of an update from the average, which it enters first."""
    update = preconditioned(grad, row, col)
    exp_avg.lerp_(update, share)
    return update.sub_(exp_avg).square_()


@register("CAME")
class CAME(ShardedOptimizer[CAMEHyper]):
    """CAME on any mesh: three collectives per axis, step and wave (see `wave_bytes`).

    Tensors of two or more dims are batches of matrices over their last two.  Their second moment and instability are
    kept as averages of the rows that the rank's slice touches and of the columns of the matrices that it touches, plus
    one number per matrix where neither are whole on the rank.  Tensors of fewer dims keep the whole second moment, and
    their update is not scaled by confidence, as in the authors' code.

    Its hyper-parameters are those of `CAMEHyper`.
    """

    hyper_type = CAMEHyper
    temporary_bytes = 4
    stacks = True

    def state_spec(self, layout: Shaped, hyper: CAMEHyper) -> dict[str, StateSpec]:
        moment = StateSpec.like(layout)
        first = replace(moment, bits=hyper.moment_bits)
        if not is_factored(layout, hyper.min_dim_size_to_factor):
            return {"exp_avg": first, "exp_avg_sq": moment}
        return {"exp_avg": first, **factored_spec(layout, "exp_avg_sq"), **factored_spec(layout, "exp_avg_res")}

    def update(self, view: View, state: State, hyper: CAMEHyper) -> Rounds:
        return came(view, state, hyper)
