"""GaLore and GoLore with SGD as inner rule, with momentum (arXiv 2410.11289, algorithm 2: MSGD) or without."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from colossal_bcd.low_rank.galore import GaLore, GaLoreHyper, Inner, Projection, Spec, Update, first_random_step
from colossal_bcd.low_rank.projector import Method
from colossal_bcd.optim.base import Params, State
from colossal_bcd.optim.functional import require
from colossal_bcd.optim.state.quantized import StorageHyper
from colossal_bcd.optim.state.rounding import Rounding
from colossal_bcd.optim.state.spec import Bits, StateSpec
from colossal_bcd.sharding import WAVE_BYTES, LowRankView, ShardView


@dataclass(frozen=True, kw_only=True)
class GaLoreSGDHyper(GaLoreHyper, StorageHyper):
    """Hyper-parameters of one param group; names and meaning are those of torch.optim.SGD."""

    lr: float = 1e-3
    """Step size."""
    momentum: float = 0.0
    """Decay of the momentum buffer, which starts as the first gradient; 0 keeps none."""
    dampening: float = 0.0
    """Part of every later gradient that does not enter the buffer."""
    weight_decay: float = 0.0
    """Decoupled, unlike torch's: after the update the weight shrinks by lr * weight_decay."""
    nesterov: bool = False
    """Step along gradient + momentum * buffer instead of along the buffer."""

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


def sgd_step(grad: Tensor, state: State, hyper: GaLoreSGDHyper) -> Inner:
    """SGD as torch computes it; asks for nothing."""
    direction = grad
    if hyper.momentum:
        buffer = state["momentum_buffer"]
        if state["step"] == 1:
            buffer.copy_(grad)
        else:
            buffer.mul_(hyper.momentum).add_(grad, alpha=1 - hyper.dampening)
        direction = grad.add(buffer, alpha=hyper.momentum) if hyper.nesterov else buffer
    yield from ()
    return Update(direction * hyper.lr, hyper.lr * hyper.weight_decay)


class GaLoreSGD(GaLore):
    """SGD with momentum on low-rank projections of the gradients, on any mesh (see `GaLore`).

    Args:
        params: parameters, or param groups as plain dicts; only groups with a `rank` are projected.
        lr, momentum, dampening, weight_decay, nesterov: see `GaLoreSGDHyper`.
        rank, update_proj_gap, scale, proj_type, svd_method, random_from_step, reproject_momentum, stagger,
            lazy_threshold, lazy_patience, clamp: see `GaLoreHyper`.
        rounding, seed, moment_bits: see `GaLoreSGDHyper`.
        wave_bytes: see `ShardedOptimizer`.
    Raises:
        ValueError: a hyper-parameter is out of range, or the rank is larger than a side of a matrix.
    """

    hyper_type = GaLoreSGDHyper
    momentum_entry = "momentum_buffer"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
        rounding: Rounding = "nearest",
        seed: int = 0,
        moment_bits: Bits = 32,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        self._construct(locals())

    def inner(
        self, view: ShardView, grad: Tensor, state: State, hyper: GaLoreSGDHyper, image: LowRankView | None
    ) -> Inner:
        return sgd_step(grad, state, hyper)

    def inner_spec(self, entry: StateSpec, hyper: GaLoreSGDHyper, image: LowRankView | None) -> Spec:
        return {"momentum_buffer": replace(entry, bits=hyper.moment_bits)} if hyper.momentum else {}


class GoLoreSGD(GaLoreSGD):
    """GaLoreSGD with GoLore's late random bases, and its first moment carried over at every refresh.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, rank, update_proj_gap,
            scale, proj_type, svd_method, stagger, lazy_threshold, lazy_patience, clamp,
            rounding, seed, moment_bits, wave_bytes: see `GaLoreSGD`.
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
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
        rounding: Rounding = "nearest",
        seed: int = 0,
        moment_bits: Bits = 32,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        first = first_random_step(type(self).__name__, rand_ratio, total_steps, random_from_step)
        self._construct(locals(), random_from_step=first, reproject_momentum=True)
