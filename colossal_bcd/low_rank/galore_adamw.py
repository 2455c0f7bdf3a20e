"""GaLore and GoLore with AdamW as inner rule (arXiv 2403.03507, algorithm 2; arXiv 2410.11289)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from colossal_bcd.low_rank.galore import GaLore, GaLoreHyper, Inner, Projection, Spec, Update, first_random_step
from colossal_bcd.low_rank.projector import Method
from colossal_bcd.optim.base import Params, State
from colossal_bcd.optim.functional import require_adam, update_moments_
from colossal_bcd.optim.state.quantized import StorageHyper
from colossal_bcd.optim.state.rounding import Rounding
from colossal_bcd.optim.state.spec import Bits, StateSpec
from colossal_bcd.sharding import WAVE_BYTES, LowRankView, ShardView


@dataclass(frozen=True, kw_only=True)
class GaLoreAdamWHyper(GaLoreHyper, StorageHyper):
    """Hyper-parameters of one param group."""

    lr: float = 1e-3
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment, before it is debiased."""
    weight_decay: float = 0.0
    """Decoupled: after the update the weight shrinks by lr * weight_decay."""
    correct_bias: bool = True
    """Debias both moments."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_adam(self.lr, self.betas, self.eps, self.weight_decay)


def adamw_step(grad: Tensor, state: State, hyper: GaLoreAdamWHyper) -> Inner:
    """AdamW with `eps` and bias correction in the order of galore_torch; asks for nothing."""
    beta1, beta2 = hyper.betas
    update_moments_(state["exp_avg"], state["exp_avg_sq"], grad, hyper.betas)
    direction = state["exp_avg_sq"].sqrt().add_(hyper.eps).reciprocal_().mul_(state["exp_avg"])
    lr = hyper.lr
    if hyper.correct_bias:
        lr *= (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
    yield from ()
    return Update(direction.mul_(lr), hyper.lr * hyper.weight_decay)


class GaLoreAdamW(GaLore):
    """AdamW on low-rank projections of the gradients, on any mesh (see `GaLore`).

    Args:
        params: parameters, or param groups as plain dicts; only groups with a `rank` are projected.
        lr, betas, eps, weight_decay, correct_bias: see `GaLoreAdamWHyper`.
        rank, update_proj_gap, scale, proj_type, svd_method, random_from_step, reproject_momentum, stagger,
            lazy_threshold, lazy_patience, clamp: see `GaLoreHyper`.
        rounding, seed, moment_bits: see `GaLoreAdamWHyper`.
        wave_bytes: see `ShardedOptimizer`.
    Raises:
        ValueError: a hyper-parameter is out of range, or the rank is larger than a side of a matrix.
    """

    hyper_type = GaLoreAdamWHyper

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: Projection = "std",
        svd_method: Method = "exact",
        random_from_step: int | None = None,
        reproject_momentum: bool = False,
        stagger: int = 1,
        lazy_threshold: float | None = None,
        lazy_patience: int = 5,
        clamp: bool = False,
        correct_bias: bool = True,
        rounding: Rounding = "nearest",
        seed: int = 0,
        moment_bits: Bits = 32,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        self._construct(locals())

    def inner(
        self, view: ShardView, grad: Tensor, state: State, hyper: GaLoreAdamWHyper, image: LowRankView | None
    ) -> Inner:
        return adamw_step(grad, state, hyper)

    def inner_spec(self, entry: StateSpec, hyper: GaLoreAdamWHyper, image: LowRankView | None) -> Spec:
        return {"exp_avg": replace(entry, bits=hyper.moment_bits), "exp_avg_sq": entry}


class GoLoreAdamW(GaLoreAdamW):
    """GaLoreAdamW with GoLore's late random bases, and its first moment carried over at every refresh.

    Args:
        params, lr, betas, eps, weight_decay, correct_bias, rank, update_proj_gap,
            scale, proj_type, svd_method, stagger, lazy_threshold, lazy_patience, clamp,
            rounding, seed, moment_bits, wave_bytes: see `GaLoreAdamW`.
        rand_ratio: fraction of `total_steps` after which bases are random.
        total_steps: length of the run in steps; needed unless `random_from_step` says when.
        random_from_step: first step, counted from 0, whose refresh is random; instead of the two above.
    Raises:
        ValueError: a hyper-parameter is out of range, or the begin of random bases is given twice or not at all.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: Projection = "std",
        svd_method: Method = "exact",
        rand_ratio: float = 0.8,
        total_steps: int | None = None,
        random_from_step: int | None = None,
        stagger: int = 1,
        lazy_threshold: float | None = None,
        lazy_patience: int = 5,
        clamp: bool = False,
        correct_bias: bool = True,
        rounding: Rounding = "nearest",
        seed: int = 0,
        moment_bits: Bits = 32,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        first = first_random_step(type(self).__name__, rand_ratio, total_steps, random_from_step)
        self._construct(locals(), random_from_step=first, reproject_momentum=True)
