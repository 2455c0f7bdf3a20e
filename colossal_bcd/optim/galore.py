"""GaLore (Zhao et al., arXiv 2403.03507) and GoLore (He et al., arXiv 2410.11289) with AdamW as inner rule.

Rounds between refreshes: one that completes boundary rows (right), or sums a strip (left) and one that spreads the
direction; none where rows and columns are whole on the rank.  A refresh adds two: the gradient to its owner, the bases
back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from colossal_bcd.optim.base import Params, State
from colossal_bcd.optim.functional import require, require_adam, update_moments_
from colossal_bcd.optim.images import ImageOptimizer, image_of
from colossal_bcd.optim.projection import Method
from colossal_bcd.optim.refresh import BASES, rank_of, refresh, refresh_due
from colossal_bcd.optim.spec import StateSpec
from colossal_bcd.sharding import WAVE_BYTES, Image, Layout, LowRank, Mesh, Rounds, ShardView
from colossal_bcd.sharding.projection import cost_of_basis, side_of

Projection = Literal["std", "reverse_std", "left", "right", "full"]


@dataclass(frozen=True, kw_only=True)
class GaLoreHyper:
    """Hyper-parameters of one param group."""

    lr: float = 1e-3
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment, before it is debiased."""
    weight_decay: float = 0.0
    """Decoupled: after the update the weight shrinks by lr * weight_decay."""
    rank: int | None = None
    """Rank of the projection of tensors of two or more dims (the first dim by the rest); None projects nothing."""
    update_proj_gap: int = 200
    """Steps between refreshes of the bases; the first step is one."""
    scale: float = 0.25
    """Factor of the projected update."""
    proj_type: Projection = "std"
    """Which dim is projected: "std" the shorter one of the global matrix, "reverse_std" the longer one, or as said."""
    svd_method: Method = "exact"
    """"exact" singular vectors, "subspace" iteration from the last bases, or "random" bases."""
    random_from_step: int | None = None
    """Refreshes from this step on (counted from 0) draw random bases (GoLore); None: never."""
    reproject_momentum: bool = False
    """Carry the first moment over to the new bases at a refresh (GoLore) instead of leaving it as it is (GaLore)."""
    seed: int = 0
    """Of random bases, with the parameter's number and the number of the refresh."""

    def __post_init__(self) -> None:
        require_adam(self.lr, self.betas, self.eps, self.weight_decay)
        require(self.rank is None or self.rank >= 1, "rank", self.rank, "None or a positive integer")
        require(self.update_proj_gap >= 1, "update_proj_gap", self.update_proj_gap, "a positive number of steps")
        require(self.scale >= 0, "scale", self.scale, "a non-negative number")
        names = ("std", "reverse_std", "left", "right", "full")
        require(self.proj_type in names, "proj_type", self.proj_type, f"one of {', '.join(names)}")
        methods = ("exact", "subspace", "random")
        require(self.svd_method in methods, "svd_method", self.svd_method, f"one of {', '.join(methods)}")
        start = self.random_from_step
        require(start is None or start >= 0, "random_from_step", start, "None or a step, 0 or more")


def galore_adamw(view: ShardView, state: State, hyper: GaLoreHyper, owner: int, image: Tensor | None = None) -> Rounds:
    """One update.

    Args:
        view: of the parameter.
        state: of the parameter.
        hyper: of its group.
        owner: rank that computes the bases at a refresh.
        image: of the gradient, where an engine has projected it already (see `ImageOptimizer`).
    """
    step, projected = state["step"], is_projected(view.layout, hyper)
    if projected:
        side = side_of(view.layout.as_matrix().shape, hyper.proj_type)
        low_rank = LowRank(view.layout.as_matrix(), side, rank_of(hyper))
        if refresh_due(state, hyper, view.key):
            yield from refresh(view, state, hyper, side, owner)
        left, right = state.get("left"), state.get("right")
        (grad,) = yield (image_of(view, image, low_rank, left, right),)
    else:
        grad = view.grad
    update_moments_(state["exp_avg"], state["exp_avg_sq"], grad, hyper.betas)
    direction = state["exp_avg_sq"].sqrt().add_(hyper.eps).reciprocal_().mul_(state["exp_avg"])
    lr = hyper.lr * (1 - hyper.betas[1] ** step) ** 0.5 / (1 - hyper.betas[0] ** step)
    if projected:
        (direction,) = yield (low_rank.whole(direction),)
        low_rank.subtract_(view.param, direction, left, right, lr * hyper.scale)
    else:
        view.param.add_(direction, alpha=-lr)
    view.param.mul_(1 - hyper.lr * hyper.weight_decay)


def is_projected(layout: Layout, hyper: GaLoreHyper) -> bool:
    """Whether a parameter of this layout is projected."""
    return hyper.rank is not None and len(layout.shape) >= 2


class GaLoreAdamW(ImageOptimizer):
    """AdamW on low-rank projections of the gradients, on any mesh.

    The global matrix is projected, whatever part of it a rank holds.  Right projections keep the moments of the rows
    that the rank's slice touches, left ones of the rank's share of the columns; the bases are whole on every rank.

    Args:
        params: parameters, or param groups as plain dicts; only groups with a `rank` are projected.
        lr, betas, eps, weight_decay, rank, update_proj_gap, scale, proj_type, svd_method, random_from_step,
            reproject_momentum, seed: see `GaLoreHyper`.
        wave_bytes: see `ShardedOptimizer`.
    Raises:
        ValueError: a hyper-parameter is out of range, or larger than a dim of a parameter.
    """

    hyper_type = GaLoreHyper
    temporary_bytes = 4

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
        seed: int = 0,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        hyper = GaLoreHyper(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            svd_method=svd_method,
            random_from_step=random_from_step,
            reproject_momentum=reproject_momentum,
            seed=seed,
        )
        super().__init__(params, hyper, wave_bytes)
        self._owners = self._assign_owners()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        hyper = self._hyper(self.param_groups[-1])
        for param in self.param_groups[-1]["params"]:
            self.state_spec(self._layouts[param], hyper)

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh, keys: Mapping[Tensor, int] | None = None) -> None:
        super().bind(layouts, mesh, keys)
        self._owners = self._assign_owners()

    def state_spec(self, layout: Layout, hyper: GaLoreHyper) -> dict[str, StateSpec]:
        if not is_projected(layout, hyper):
            moment = StateSpec(kind="elementwise", shape=layout.local_shape)
            return {"exp_avg": moment, "exp_avg_sq": moment}
        matrix, rank = layout.as_matrix(), rank_of(hyper)
        if rank > min(matrix.shape):
            raise ValueError(
                f"rank={rank} for a parameter of shape {layout.shape}, expected at most {min(matrix.shape)}. "
                "Give that parameter a group of its own with a smaller rank."
            )
        side = side_of(matrix.shape, hyper.proj_type)
        moment = StateSpec(kind="low_rank", shape=LowRank(matrix, side, rank).shape, side=side)
        spec = {"exp_avg": moment, "exp_avg_sq": moment}
        if side != "right":
            spec["left"] = StateSpec(kind="replicated", shape=(matrix.shape[0], rank))
        if side != "left":
            spec["right"] = StateSpec(kind="replicated", shape=(matrix.shape[1], rank))
        return spec

    def update(self, view: ShardView, state: State, hyper: GaLoreHyper) -> Rounds:
        return galore_adamw(view, state, hyper, self._owners.get(view.key, 0), self.take_image(view.key))

    def image_wanted(self, layout: Layout, state: State, hyper: GaLoreHyper, key: int) -> Image | None:
        if not is_projected(layout, hyper) or refresh_due(state, hyper, key):
            return None
        matrix = layout.as_matrix()
        side, (left, right) = side_of(matrix.shape, hyper.proj_type), (state.get(name) for name in BASES)
        return Image(layout=matrix, side=side, rank=rank_of(hyper), left=left, right=right)

    def _assign_owners(self) -> dict[int, int]:
        """Which rank computes the bases of which parameter: the largest first, each to the rank with least to do."""
        matrices = []
        for group in self.param_groups:
            for param in group["params"]:
                layout = self._layouts[param]
                if is_projected(layout, self._hyper(group)):
                    matrices.append((cost_of_basis(layout.as_matrix().shape), self._keys[param], layout))
        loads: dict[int, int] = {}
        owners = {}
        for cost, key, layout in sorted(matrices, key=lambda item: (-item[0], item[1])):
            ranks = math.prod(axis.size for axis in (layout.slice, layout.split) if axis is not None)
            owners[key] = min(range(ranks), key=lambda rank: (loads.get(rank, 0), rank))
            loads[owners[key]] = loads.get(owners[key], 0) + cost
        return owners


class GoLoreAdamW(GaLoreAdamW):
    """GaLoreAdamW with GoLore's late random bases, and its first moment carried over at every refresh.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, proj_type, svd_method, seed, wave_bytes: see
            `GaLoreAdamW`.
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
        seed: int = 0,
        wave_bytes: int = WAVE_BYTES,
    ) -> None:
        require(0 <= rand_ratio <= 1, "rand_ratio", rand_ratio, "a fraction in [0, 1]")
        if (total_steps is None) == (random_from_step is None):
            raise ValueError(
                f"GoLoreAdamW: got total_steps={total_steps} and random_from_step={random_from_step}, expected exactly "
                "one. Give total_steps with rand_ratio, or the step itself."
            )
        if total_steps is not None:
            # The update numbered u, from 0, is random once u / total_steps >= rand_ratio.
            random_from_step = math.ceil(rand_ratio * total_steps)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            svd_method=svd_method,
            random_from_step=random_from_step,
            reproject_momentum=True,
            seed=seed,
            wave_bytes=wave_bytes,
        )
