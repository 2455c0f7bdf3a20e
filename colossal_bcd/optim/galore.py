"""GaLore (Zhao et al., arXiv 2403.03507) and GoLore (He et al., arXiv 2410.11289) around an inner rule.

Rounds between refreshes, besides the inner rule's own: one that completes boundary rows (right), or sums a strip (left)
and one that spreads the update; none where rows and columns are whole on the rank.  A refresh adds two: the gradient to
its owner, the bases back.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from colossal_bcd.optim.base import ShardedOptimizer, State
from colossal_bcd.optim.functional import require
from colossal_bcd.optim.images import ImageOptimizer, image_of
from colossal_bcd.optim.projection import Method
from colossal_bcd.optim.refresh import BASES, rank_of, refresh, refresh_due
from colossal_bcd.optim.rounding import RoundingHyper
from colossal_bcd.optim.spec import StateSpec
from colossal_bcd.sharding import Image, ImageMatrix, Layout, LowRank, Mesh, Request, Rounds, ShardView
from colossal_bcd.sharding.projection import Side, cost_of_basis, side_of

logger = logging.getLogger(__name__)

Projection = Literal["std", "reverse_std", "left", "right", "full"]
Spec: TypeAlias = dict[str, StateSpec]


@dataclass(frozen=True, kw_only=True)
class GaLoreHyper(RoundingHyper):
    """Hyper-parameters of the projection in one param group."""

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
    clamp: bool = False
    """Project a matrix with a side below `rank` with that side as its rank, instead of refusing it."""
    seed: int = 0
    """Of random bases, with the parameter's number and the number of the refresh; and of stochastic rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        require(self.rank is None or (whole and self.rank >= 1), "rank", self.rank, "None or a positive integer")
        require(self.update_proj_gap >= 1, "update_proj_gap", self.update_proj_gap, "a positive number of steps")
        require(self.scale >= 0, "scale", self.scale, "a non-negative number")
        names = ("std", "reverse_std", "left", "right", "full")
        require(self.proj_type in names, "proj_type", self.proj_type, f"one of {', '.join(names)}")
        methods = ("exact", "subspace", "random")
        require(self.svd_method in methods, "svd_method", self.svd_method, f"one of {', '.join(methods)}")
        start = self.random_from_step
        require(start is None or start >= 0, "random_from_step", start, "None or a step, 0 or more")


@dataclass(frozen=True)
class Update:
    """What an inner rule makes of a gradient, or of a low-rank image of it."""

    step: Tensor
    """To subtract, in the gradient's shape."""
    decay: float | Tensor = 0.0
    """Part of the weight that vanishes."""
    decays_first: bool = False
    """Whether it vanishes before the step is subtracted."""


Inner: TypeAlias = Generator[tuple[Request, ...], tuple[Any, ...], Update]


def apply(weight: Tensor, update: Update, subtract: Callable[[], Any]) -> None:
    """Decay and step in the inner rule's order.

    Args:
        weight: [n], written.
        update: see `Update`.
        subtract: subtracts the step.
    """
    keep = None if isinstance(update.decay, float) and update.decay == 0 else 1 - update.decay
    if keep is not None and update.decays_first:
        weight.mul_(keep)
    subtract()
    if keep is not None and not update.decays_first:
        weight.mul_(keep)


def is_projected(layout: Layout, hyper: GaLoreHyper) -> bool:
    """Whether a parameter of this layout is projected."""
    return hyper.rank is not None and len(layout.shape) >= 2


def plan_of(layout: Layout, hyper: GaLoreHyper) -> tuple[Layout, Side, int]:
    """The matrix that a projected parameter is, its side and its rank."""
    matrix = layout.as_matrix()
    return matrix, side_of(matrix.shape, hyper.proj_type), rank_of(layout, hyper)


class GaLore(ImageOptimizer):
    """Base of the optimizers that apply an inner rule to low-rank projections of the gradients, on any mesh.

    The global matrix is projected, whatever part of it a rank holds.  Right projections keep the inner rule's state of
    the rows that the rank's slice touches, left ones of the rank's share of the columns; the bases are whole on every
    rank.  Tensors of fewer than two dims are not projected: the inner rule sees them as they are.
    """

    hyper_type: ClassVar[Any] = GaLoreHyper
    temporary_bytes = 4
    momentum_entry: ClassVar[str] = "exp_avg"
    """State entry that `reproject_momentum` carries over."""

    def _construct(self, given: Mapping[str, Any], **fixed: Any) -> None:
        """Construct from the arguments of a subclass' constructor, by name.

        Args:
            given: the arguments, with `params` and `wave_bytes`, and one for every hyper-parameter that is not fixed.
            fixed: hyper-parameters that are no arguments.
        """
        fields = (field.name for field in dataclasses.fields(self.hyper_type))
        hyper = self.hyper_type(**{name: given[name] for name in fields if name not in fixed}, **fixed)
        # By name: the next class may be the inner rule's own, whose constructor takes other arguments.
        self._images = {}
        ShardedOptimizer.__init__(self, given["params"], hyper, given["wave_bytes"])
        self._owners = self._assign_owners()

    @abstractmethod
    def inner(self, view: ShardView, grad: Tensor, state: State, hyper: Any, image: ImageMatrix | None) -> Inner:
        """The inner rule: one update from the gradient, or from its low-rank image."""

    @abstractmethod
    def inner_spec(self, entry: StateSpec, hyper: Any, image: ImageMatrix | None) -> Spec:
        """State of the inner rule; `entry` has one value per value of the gradient or of the image."""

    def plain(self, view: ShardView, state: State, hyper: Any) -> Rounds:
        """The update of a parameter that is not projected."""
        update = yield from self.inner(view, view.grad, state, hyper, None)
        apply(view.param, update, lambda: view.param.sub_(update.step))

    def plain_spec(self, layout: Layout, hyper: Any) -> Spec:
        """State of a parameter that is not projected."""
        return self.inner_spec(StateSpec(kind="elementwise", shape=layout.local_shape), hyper, None)

    def projected(self, view: ShardView, state: State, hyper: Any) -> Rounds:
        """The update of a projected parameter (arXiv 2403.03507, algorithm 2)."""
        matrix, side, rank = plan_of(view.layout, hyper)
        low_rank, image = LowRank(matrix, side, rank), ImageMatrix(matrix, side, rank)
        if refresh_due(state, hyper, view.key):
            yield from refresh(view, state, hyper, side, self._owners.get(view.key, 0), self.momentum_entry)
        left, right = state.get("left"), state.get("right")
        (grad,) = yield (image_of(view, self.take_image(view.key), low_rank, left, right),)
        update = yield from self.inner(view, grad, state, hyper, image)
        (step,) = yield (low_rank.whole(update.step),)
        apply(view.param, update, lambda: low_rank.subtract_(view.param, step, left, right, hyper.scale))

    def update(self, view: ShardView, state: State, hyper: Any) -> Rounds:
        rule = self.projected if is_projected(view.layout, hyper) else self.plain
        return rule(view, state, hyper)

    def state_spec(self, layout: Layout, hyper: Any) -> Spec:
        if not is_projected(layout, hyper):
            return self.plain_spec(layout, hyper)
        matrix, side, rank = plan_of(layout, hyper)
        image = ImageMatrix(matrix, side, rank)
        spec = self.inner_spec(StateSpec(kind="low_rank", shape=image.held, side=side), hyper, image)
        if side != "right":
            spec["left"] = StateSpec(kind="replicated", shape=(matrix.shape[0], rank))
        if side != "left":
            spec["right"] = StateSpec(kind="replicated", shape=(matrix.shape[1], rank))
        return spec

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        hyper, names, params = self._hyper(group), group.get("param_names", ()), group["params"]
        for index, param in enumerate(params):
            if is_projected(self._layouts[param], hyper):
                rank_of(self._layouts[param], hyper, names[index] if len(names) == len(params) else f"number {index}")
        vectors = sum(param.dim() < 2 for param in params)
        if hyper.rank is not None and vectors:
            logger.info(
                "%s: %d of the %d parameters of a group with rank=%d have fewer than two dims and are not projected",
                type(self).__name__,
                vectors,
                len(params),
                hyper.rank,
            )

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh, keys: Mapping[Tensor, int] | None = None) -> None:
        super().bind(layouts, mesh, keys)
        self._owners = self._assign_owners()

    def image_wanted(self, layout: Layout, state: State, hyper: Any, key: int) -> Image | None:
        if not is_projected(layout, hyper) or refresh_due(state, hyper, key):
            return None
        matrix, side, rank = plan_of(layout, hyper)
        left, right = (state.get(name) for name in BASES)
        return Image(layout=matrix, side=side, rank=rank, left=left, right=right)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy has no mesh, where every basis has one owner; `bind` assigns them anew.
        self.__dict__.setdefault("_owners", {})

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


def first_random_step(name: str, rand_ratio: float, total_steps: int | None, random_from_step: int | None) -> int:
    """The step, counted from 0, from which GoLore's bases are random.

    Args:
        name: of the optimizer.
        rand_ratio: fraction of `total_steps` before it.
        total_steps: length of the run; None where `random_from_step` is given.
        random_from_step: the step itself; None where `total_steps` is given.
    Raises:
        ValueError: both are given or none, or the fraction is none.
    """
    require(0 <= rand_ratio <= 1, "rand_ratio", rand_ratio, "a fraction in [0, 1]")
    if random_from_step is not None and total_steps is None:
        return random_from_step
    if total_steps is None or random_from_step is not None:
        raise ValueError(
            f"{name}: got total_steps={total_steps} and random_from_step={random_from_step}, expected exactly "
            "one. Give total_steps with rand_ratio, or the step itself."
        )
    # The update numbered u, from 0, is random once u / total_steps >= rand_ratio.
    return math.ceil(rand_ratio * total_steps)
