"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2): no rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from colossal_bcd.optim.base import Params, ShardedOptimizer, State
from colossal_bcd.optim.functional import adam_direction, require_adam, update_moments_
from colossal_bcd.optim.state.quantized import StorageHyper
from colossal_bcd.optim.state.rounding import Rounding
from colossal_bcd.optim.state.spec import Bits, StateSpec
from colossal_bcd.sharding import WAVE_BYTES, Layout, Rounds, ShardView


@dataclass(frozen=True, kw_only=True)
class AdamWHyper(StorageHyper):
    """Hyper-parameters of one param group."""

    lr: float = 1e-3
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the debiased second moment."""
    weight_decay: float = 1e-2
    """Decoupled: the weight shrinks by lr * weight_decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_adam(self.lr, self.betas, self.eps, self.weight_decay)


def adamw(view: ShardView, state: State, hyper: AdamWHyper) -> Rounds:
    """One AdamW update; asks for nothing."""
    update_moments_(state["exp_avg"], state["exp_avg_sq"], view.grad, hyper.betas)
    direction = adam_direction(state["exp_avg"], state["exp_avg_sq"], state["step"], hyper.betas, hyper.eps)
    view.param.mul_(1 - hyper.lr * hyper.weight_decay).add_(direction, alpha=-hyper.lr)
    yield from ()


class AdamW(ShardedOptimizer):
    """AdamW on any mesh, without communication.

    Args:
        params: parameters, or param groups as plain dicts.
        lr, betas, eps, weight_decay, rounding, seed, moment_bits: see `AdamWHyper`.
        wave_bytes: see `ShardedOptimizer`.
    Raises:
        ValueError: a hyper-parameter is out of range.
    """

    hyper_type = AdamWHyper
    temporary_bytes = 0
    stacks = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: Rounding = "nearest",
        seed: int = 0,
        moment_bits: Bits = 32,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        hyper = AdamWHyper(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rounding=rounding,
            seed=seed,
            moment_bits=moment_bits,
        )
        super().__init__(params, hyper, wave_bytes)

    def state_spec(self, layout: Layout, hyper: AdamWHyper) -> dict[str, StateSpec]:
        moment = StateSpec(kind="elementwise", shape=layout.local_shape)
        return {"exp_avg": replace(moment, bits=hyper.moment_bits), "exp_avg_sq": moment}

    def update(self, view: ShardView, state: State, hyper: AdamWHyper) -> Rounds:
        return adamw(view, state, hyper)
