"""Adafactor (Shazeer and Stern, arXiv 1804.04235, algorithms 4 to 6, as in transformers.Adafactor): two rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

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
from colossal_bcd.optim.options import Storage, plain_number, require
from colossal_bcd.optim.register import register
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec
from colossal_bcd.sharding import Lazy, Rounds, View, wide


@dataclass(frozen=True)
class AdafactorHyper(Storage):
    """Hyper-parameters of one param group."""

    lr: float | None = None
    """Step size; None with `relative_step`."""
    eps: tuple[float, float] = (1e-30, 1e-3)
    """Added to the squared gradient; least root mean square of a weight for `scale_parameter`."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update before the step size."""
    decay_rate: float = -0.8
    """The second moment's decay at step t is 1 - t ** decay_rate."""
    beta1: float | None = None
    """Decay of the first moment; None keeps none."""
    weight_decay: float = 0.0
    """Decoupled: the weight shrinks by the step size times weight_decay."""
    scale_parameter: bool = True
    """Multiply the step size by the root mean square of the weight."""
    relative_step: bool = True
    """Step size min(1e-2, 1 / sqrt(t)) instead of lr."""
    warmup_init: bool = False
    """With relative_step: min(1e-6 t, 1 / sqrt(t))."""
    _: KW_ONLY
    min_dim_size_to_factor: int = 0
    """Matrices with a smaller dim keep the whole second moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr is None or self.lr >= 0, "lr", self.lr, "None or a non-negative number")
        require(self.lr is not None or self.relative_step, "lr", self.lr, "a number where relative_step is False")
        require(len(self.eps) == 2 and min(self.eps) >= 0, "eps", self.eps, "two non-negative numbers")
        require(self.clip_threshold > 0, "clip_threshold", self.clip_threshold, "a positive number")
        require(self.decay_rate <= 0, "decay_rate", self.decay_rate, "a number that is not positive")
        require(self.beta1 is None or 0 <= self.beta1 < 1, "beta1", self.beta1, "None or a number in [0, 1)")
        require(
            self.beta1 is not None or self.moment_bits == 32,
            "moment_bits",
            self.moment_bits,
            "32 where beta1 is None, which keeps no first moment",
        )
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a non-negative number")
        require(self.min_dim_size_to_factor >= 0, "min_dim_size_to_factor", self.min_dim_size_to_factor, "0 or more")
        require(self.relative_step or not self.warmup_init, "warmup_init", True, "False where relative_step is False")


def step_size(hyper: AdafactorHyper, step: int, rms: Tensor) -> Tensor:
    """Step size at step t (algorithm 5 and section 9): rho_t, times max(eps2, RMS of the weight)."""
    if hyper.relative_step:
        rho = min(1e-6 * step if hyper.warmup_init else 1e-2, step**-0.5)
    else:
        assert hyper.lr is not None
        rho = hyper.lr
    return rms.clamp(min=hyper.eps[1]) * rho if hyper.scale_parameter else torch.full_like(rms, rho)


def adafactor(view: View, state: State, hyper: AdafactorHyper) -> Rounds:
    """One Adafactor update.  The weight's root mean square travels with the first round that exists anyway."""
    weight, share, eps = view.weight, state.step**hyper.decay_rate, hyper.eps[0]
    root: Root
    if "exp_avg_sq_row" in state:
        # No variable holds what is asked for: a stack's gradients would stay alive.
        means, size = yield (
            view.statistics.means(Lazy(torch.square, view.stored_grad)),
            weight.square_sum(weight.param),
        )
        root = FactoredAverage(view.statistics, state, "exp_avg_sq").update_(means, eps, share).inverse_root()
        (length,) = yield (view.square_sum(Lazy(preconditioned, view.stored_grad, *root)),)
    else:
        root = (state["exp_avg_sq"],)
        length, size = yield (
            view.square_sum(Lazy(update_and_precondition_, *root, view.stored_grad, eps=eps, share=share)),
            weight.square_sum(weight.param),
        )
    state["RMS"].copy_((size / max(weight.numel, 1)).sqrt())
    lr = step_size(hyper, state.step, state["RMS"])
    excess = ((length / max(view.numel, 1)).sqrt() / hyper.clip_threshold).clamp_(min=1)
    root, factor = times(root, (lr / excess).to(wide(weight.param.dtype)))
    if hyper.beta1 is None:
        step = Lazy(preconditioned, view.stored_grad, *root, **factor)
    else:
        step = Lazy(update_average_, state["exp_avg"], view.stored_grad, *root, share=1 - hyper.beta1, **factor)
    yield from view.subtract(step, decay=lr * hyper.weight_decay if hyper.weight_decay else 0.0)


@register("Adafactor")
class Adafactor(ShardedOptimizer[AdafactorHyper]):
    """Adafactor on any mesh: two collectives per axis, step and wave (see `wave_bytes`).

    Tensors of two or more dims are batches of matrices over their last two.  Their second moment is kept as averages of
    the rows that the rank's slice touches and of the columns of the matrices that it touches, plus one number per
    matrix where neither are whole on the rank.  Tensors of fewer dims keep the whole second moment.

    Its hyper-parameters are those of `AdafactorHyper`.

    Raises:
        ValueError: `lr` is given together with `relative_step`.
    """

    hyper_type = AdafactorHyper
    temporary_bytes = 4
    stacks = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # Only here: a scheduler may write an lr into the groups of a relative step, where it means nothing.
        group = {**self.defaults, **param_group}
        if group["lr"] is not None and group["relative_step"]:
            raise ValueError(
                f"Adafactor: got lr={group['lr']} and relative_step=True, which sets the step size itself. "
                "Pass relative_step=False to use lr, or lr=None."
            )
        super().add_param_group(param_group)

    def state_spec(self, layout: Shaped, hyper: AdafactorHyper) -> dict[str, StateSpec]:
        moment = StateSpec.like(layout)
        spec = {"RMS": StateSpec(kind="replicated", shape=(1,))}
        if hyper.beta1 is not None:
            spec["exp_avg"] = replace(moment, bits=hyper.moment_bits)
        if is_factored(layout, hyper.min_dim_size_to_factor):
            return {**spec, **factored_spec(layout, "exp_avg_sq")}
        return {**spec, "exp_avg_sq": moment}

    def update(self, view: View, state: State, hyper: AdafactorHyper) -> Rounds:
        return adafactor(view, state, hyper)

    def _get_lr(self, param_group: Mapping[str, Any], param_state: Mapping[str, Any]) -> float:
        """Step size of a parameter at its last step; transformers' AdafactorSchedule asks for it by this name.

        Before the first step of its state it is what the schedule has written into the group, its initial lr.
        """
        if not param_state:
            return plain_number(param_group["lr"]) or 0.0
        return step_size(self.hyper_of(param_group), param_state["step"], param_state["RMS"]).item()
