"""GaLore and GoLore with Adafactor as inner rule, as in galore_torch: two more rounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from colossal_bcd.low_rank.galore import GaLore, GaLoreHyper, Inner, Projection, Spec, Update, first_random_step
from colossal_bcd.low_rank.projector import Method
from colossal_bcd.optim.adafactor import Adafactor, AdafactorHyper, step_size
from colossal_bcd.optim.base import Params, State
from colossal_bcd.optim.factored import FactoredAverage, capped_
from colossal_bcd.optim.state.rounding import Rounding
from colossal_bcd.optim.state.spec import Bits, StateSpec
from colossal_bcd.sharding import WAVE_BYTES, Layout, LowRankView, Rounds, ShardView


@dataclass(frozen=True, kw_only=True)
class GaLoreAdafactorHyper(GaLoreHyper, AdafactorHyper):
    """Hyper-parameters of one param group."""


def adafactor_step(
    view: ShardView, grad: Tensor, state: State, hyper: GaLoreAdafactorHyper, image: LowRankView
) -> Inner:
    """Adafactor (see `optim.adafactor`) on an image: its rows, columns and root mean square, the weight's own size."""
    weight = state["step"] ** hyper.decay_rate
    squared = grad.square().add_(hyper.eps[0])
    if "exp_avg_sq_row" in state:
        means, size = yield image.means(squared), view.square_sum(view.param)
        average = FactoredAverage(image, state, "exp_avg_sq")
        average.update_(means, weight)
        step = average.precondition_(grad.clone())
        (length,) = yield (image.square_sum(step),)
    else:
        step = state["exp_avg_sq"].lerp_(capped_(squared), weight).rsqrt().mul_(grad)
        length, size = yield image.square_sum(step), view.square_sum(view.param)
    state["RMS"].copy_((size / view.layout.numel).sqrt())
    lr = step_size(hyper, state["step"], state["RMS"])
    excess = ((length / image.numel).sqrt() / hyper.clip_threshold).clamp_(min=1)
    step.mul_((lr / excess).to(step.dtype))
    if hyper.beta1 is not None:
        step = state["exp_avg"].lerp_(step, 1 - hyper.beta1).clone()
    return Update(step, lr * hyper.weight_decay if hyper.weight_decay else 0.0, decays_first=True)


class GaLoreAdafactor(GaLore, Adafactor):
    """Adafactor on low-rank projections of the gradients, on any mesh (see `GaLore`).

    Args:
        params: parameters, or param groups as plain dicts; only groups with a `rank` are projected.
        lr, eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative_step,
            warmup_init, min_dim_size_to_factor: see `GaLoreAdafactorHyper`.
        rank, update_proj_gap, scale, proj_type, svd_method, random_from_step, reproject_momentum, stagger,
            lazy_threshold, lazy_patience, clamp: see `GaLoreHyper`.
        rounding, seed, moment_bits: see `GaLoreAdafactorHyper`.
        wave_bytes: see `ShardedOptimizer`.
    Raises:
        ValueError: a hyper-parameter is out of range, or the rank is larger than a side of a matrix.
    """

    hyper_type = GaLoreAdafactorHyper

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
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
        min_dim_size_to_factor: int = 0,
        rounding: Rounding = "nearest",
        seed: int = 0,
        moment_bits: Bits = 32,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        self._construct(locals())

    def inner(
        self, view: ShardView, grad: Tensor, state: State, hyper: GaLoreAdafactorHyper, image: LowRankView | None
    ) -> Inner:
        assert image is not None
        return adafactor_step(view, grad, state, hyper, image)

    def inner_spec(self, entry: StateSpec, hyper: GaLoreAdafactorHyper, image: LowRankView | None) -> Spec:
        assert image is not None
        spec = {"RMS": StateSpec(kind="replicated", shape=(1,))}
        if hyper.beta1 is not None:
            spec["exp_avg"] = replace(entry, bits=hyper.moment_bits)
        if min(image.shape) < hyper.min_dim_size_to_factor:
            return {**spec, "exp_avg_sq": entry}
        rows, columns = image.held
        return {
            **spec,
            "exp_avg_sq_row": StateSpec(kind="row", shape=(rows,), side=image.side),
            "exp_avg_sq_col": StateSpec(kind="column", shape=(columns,), side=image.side),
        }

    def plain(self, view: ShardView, state: State, hyper: GaLoreAdafactorHyper) -> Rounds:
        return Adafactor.update(self, view, state, hyper)

    def plain_spec(self, layout: Layout, hyper: GaLoreAdafactorHyper) -> Spec:
        return Adafactor.state_spec(self, layout, hyper)


class GoLoreAdafactor(GaLoreAdafactor):
    """GaLoreAdafactor with GoLore's late random bases, and its first moment carried over at every refresh.

    Args:
        params, lr, eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative_step,
            warmup_init, min_dim_size_to_factor, rank, update_proj_gap,
            scale, proj_type, svd_method, stagger, lazy_threshold, lazy_patience, clamp,
            rounding, seed, moment_bits, wave_bytes: see `GaLoreAdafactor`.
        rand_ratio: fraction of `total_steps` after which bases are random.
        total_steps: length of the run in steps; needed unless `random_from_step` says when.
        random_from_step: first step, counted from 0, whose refresh is random; instead of the two above.
    Raises:
        ValueError: a hyper-parameter is out of range, or the begin of random bases is given twice or not at all.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
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
        min_dim_size_to_factor: int = 0,
        rounding: Rounding = "nearest",
        seed: int = 0,
        moment_bits: Bits = 32,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        first = first_random_step(type(self).__name__, rand_ratio, total_steps, random_from_step)
        self._construct(locals(), random_from_step=first, reproject_momentum=True)
