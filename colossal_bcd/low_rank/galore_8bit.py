"""GaLore and GoLore with AdamW as inner rule whose two moments are kept in 8 bits, as in galore_torch's AdamW8bit.

Storage is that of `optim.quantized`: the first moment by the signed map, the second by the unsigned one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from colossal_bcd.low_rank.galore import GaLore, GaLoreHyper, Inner, Projection, Spec, Update, first_random_step
from colossal_bcd.low_rank.projector import Method
from colossal_bcd.optim.base import Params, State
from colossal_bcd.optim.functional import adam_direction, require, require_adam, update_moments_
from colossal_bcd.optim.state.quantized import require_library
from colossal_bcd.optim.state.rounding import Rounding
from colossal_bcd.optim.state.spec import Bits, StateSpec
from colossal_bcd.sharding import WAVE_BYTES, Layout, LowRankView, ShardView


@dataclass(frozen=True, kw_only=True)
class GaLoreAdamW8bitHyper(GaLoreHyper):
    """Hyper-parameters of one param group."""

    lr: float = 1e-3
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the debiased second moment."""
    weight_decay: float = 1e-2
    """Decoupled: after the update the weight shrinks by lr * weight_decay."""
    min_8bit_size: int = 4096
    """Moments with fewer values, of the whole parameter or of its whole image, are kept in float32."""
    state_bits: Bits = 8
    """Bits of a value of both moments between steps; 32 keeps all in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_adam(self.lr, self.betas, self.eps, self.weight_decay)
        require(self.min_8bit_size >= 0, "min_8bit_size", self.min_8bit_size, "a number of values, 0 or more")
        require(self.state_bits in (8, 32), "state_bits", self.state_bits, "8 or 32")


def adamw_8bit_step(grad: Tensor, state: State, hyper: GaLoreAdamW8bitHyper) -> Inner:
    """AdamW with `eps` and bias correction in the order of bitsandbytes; asks for nothing."""
    update_moments_(state["exp_avg"], state["exp_avg_sq"], grad, hyper.betas)
    direction = adam_direction(state["exp_avg"], state["exp_avg_sq"], state["step"], hyper.betas, hyper.eps)
    yield from ()
    return Update(direction.mul_(hyper.lr), hyper.lr * hyper.weight_decay)


def moments_of(entry: StateSpec, hyper: GaLoreAdamW8bitHyper, numel: int) -> Spec:
    """Both moments of `numel` values altogether, held here as `entry` says."""
    bits: Bits = hyper.state_bits if numel >= hyper.min_8bit_size else 32
    return {"exp_avg": replace(entry, bits=bits), "exp_avg_sq": replace(entry, bits=bits, signed=False)}


class GaLoreAdamW8bit(GaLore):
    """AdamW with 8-bit moments on low-rank projections of the gradients, on any mesh (see `GaLore`).

    Args:
        params: parameters, or param groups as plain dicts; only groups with a `rank` are projected.
        lr, betas, eps, weight_decay, min_8bit_size, state_bits: see `GaLoreAdamW8bitHyper`.
        rank, update_proj_gap, scale, proj_type, svd_method, random_from_step, reproject_momentum, stagger,
            lazy_threshold, lazy_patience, clamp: see `GaLoreHyper`.
        rounding, seed: see `GaLoreAdamW8bitHyper`.
        wave_bytes: see `ShardedOptimizer`.
    Raises:
        ImportError: bitsandbytes is missing and `state_bits` is 8.
        ValueError: a hyper-parameter is out of range, or the rank is larger than a side of a matrix.
    """

    hyper_type = GaLoreAdamW8bitHyper
    temporary_bytes = 12

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
        min_8bit_size: int = 4096,
        state_bits: Bits = 8,
        rounding: Rounding = "nearest",
        seed: int = 0,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        self._construct(locals())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.hyper_of(self.param_groups[-1]).state_bits == 8:
            require_library()

    def inner(
        self, view: ShardView, grad: Tensor, state: State, hyper: GaLoreAdamW8bitHyper, image: LowRankView | None
    ) -> Inner:
        return adamw_8bit_step(grad, state, hyper)

    def inner_spec(self, entry: StateSpec, hyper: GaLoreAdamW8bitHyper, image: LowRankView | None) -> Spec:
        assert image is not None
        return moments_of(entry, hyper, image.numel)

    def plain_spec(self, layout: Layout, hyper: GaLoreAdamW8bitHyper) -> Spec:
        return moments_of(StateSpec(kind="elementwise", shape=layout.local_shape), hyper, layout.numel)


class GoLoreAdamW8bit(GaLoreAdamW8bit):
    """GaLoreAdamW8bit with GoLore's late random bases, and its first moment carried over at every refresh.

    Args:
        params, lr, betas, eps, weight_decay, min_8bit_size, state_bits, rank, update_proj_gap,
            scale, proj_type, svd_method, stagger, lazy_threshold, lazy_patience, clamp,
            rounding, seed, wave_bytes: see `GaLoreAdamW8bit`.
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
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
        min_8bit_size: int = 4096,
        state_bits: Bits = 8,
        rounding: Rounding = "nearest",
        seed: int = 0,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        first = first_random_step(type(self).__name__, rand_ratio, total_steps, random_from_step)
        self._construct(locals(), random_from_step=first, reproject_momentum=True)
