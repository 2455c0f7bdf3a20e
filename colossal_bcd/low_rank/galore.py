"""GaLore (Zhao et al., arXiv 2403.03507) and GoLore (He et al., arXiv 2410.11289) around an inner rule.

Rounds between refreshes, besides the inner rule's own: one that completes boundary rows (right), or sums a strip
(left), and one that spreads their update; none where rows and columns are whole on the rank.  A refresh adds two: the
gradient to its owner, the bases back.
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

from colossal_bcd.low_rank.reduced_gradients import ReplicatedUpdate, low_rank_gradient_of
from colossal_bcd.low_rank.refresh import BASES, rank_of, refresh_if_due
from colossal_bcd.low_rank.refresh_schedule import RefreshHyper, lazy_spec
from colossal_bcd.low_rank.refreshing import RefreshingOptimizer, is_projected
from colossal_bcd.optim.accepted import members_with_names
from colossal_bcd.optim.base import ShardedOptimizer, State
from colossal_bcd.optim.functional import require
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.sharding import Layout, LowRank, LowRankGradient, LowRankView, Request, Rounds, ShardView
from colossal_bcd.sharding.low_rank import Side, side_of

logger = logging.getLogger(__name__)

Projection = Literal["std", "reverse_std", "left", "right", "full"]
Spec: TypeAlias = dict[str, StateSpec]


@dataclass(frozen=True, kw_only=True)
class GaLoreHyper(RefreshHyper):
    """Hyper-parameters of the projection in one param group."""

    scale: float = 0.25
    """Factor of the projected update."""
    proj_type: Projection = "std"
    """Which dim is projected: "std" the shorter one of the global matrix, "reverse_std" the longer one, or as said."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale >= 0, "scale", self.scale, "a non-negative number")
        names = ("std", "reverse_std", "left", "right", "full")
        require(self.proj_type in names, "proj_type", self.proj_type, f"one of {', '.join(names)}")


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


def plan_of(layout: Layout, hyper: GaLoreHyper) -> tuple[Layout, Side, int]:
    """The matrix that a projected parameter is, its side and its rank."""
    matrix = layout.as_matrix()
    return matrix, side_of(matrix.shape, hyper.proj_type), rank_of(layout, hyper)


class GaLore(RefreshingOptimizer):
    """Base of the optimizers that apply an inner rule to low-rank projections of the gradients, on any mesh.

    The global matrix is projected, whatever part of it a rank holds.  Right projections keep the inner rule's state of
    the rows that begin on the rank's slice, left ones of the rank's share of the columns; the bases are whole on every
    rank.  Tensors of fewer than two dims are not projected: the inner rule sees them as they are.
    """

    hyper_type: ClassVar[Any] = GaLoreHyper
    temporary_bytes = 4
    stacks = False  # bases and their refreshes are a matrix's own
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
        self._begin()
        ShardedOptimizer.__init__(self, given["params"], hyper, given["wave_bytes"])
        # Not what the groups hold: slices of matrices, which `bind` will say what they are, are flat.
        if all(group["rank"] is None for group in self.param_groups):
            count = sum(len(group["params"]) for group in self.param_groups)
            raise ValueError(
                f"{type(self).__name__}: no param group has a rank, so none of the {count} parameters is projected, "
                "expected at least one. Put matrices into a group with rank=..., as colossal_bcd.param_groups(model, "
                "rank=...) does, or use an optimizer without GaLore."
            )

    @abstractmethod
    def inner(self, view: ShardView, grad: Tensor, state: State, hyper: Any, image: LowRankView | None) -> Inner:
        """The inner rule: one update from the gradient, or from its low-rank image."""

    @abstractmethod
    def inner_spec(self, entry: StateSpec, hyper: Any, image: LowRankView | None) -> Spec:
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
        low_rank, image = LowRank(matrix, side, rank), LowRankView(matrix, side, rank)
        yield from refresh_if_due(view, state, hyper, side, self.turn(view.key), self.momentum_entry)
        left, right = state.get("left"), state.get("right")
        (grad,) = yield (low_rank_gradient_of(view, self.take_low_rank(view.key), low_rank, left, right),)
        update = yield from self.inner(view, grad, state, hyper, image)

        def write(weight: Tensor, low_rank: LowRank, step: Tensor) -> None:
            apply(weight, update, lambda: low_rank.subtract_(weight, step, left, right, hyper.scale))

        if self.replicated_updates is not None:
            plan = LowRankGradient(layout=matrix, side=side, rank=rank, left=left, right=right)
            self.replicated_updates[view.key] = ReplicatedUpdate(plan, update.step, write)
            return
        (step,) = yield (low_rank.whole(update.step),)
        write(view.param, low_rank, step)

    def update(self, view: ShardView, state: State, hyper: Any) -> Rounds:
        rule = self.projected if is_projected(view.layout, hyper) else self.plain
        return rule(view, state, hyper)

    def state_spec(self, layout: Layout, hyper: Any) -> Spec:
        if not is_projected(layout, hyper):
            return self.plain_spec(layout, hyper)
        matrix, side, rank = plan_of(layout, hyper)
        image = LowRankView(matrix, side, rank)
        spec = {
            **self.inner_spec(StateSpec(kind="low_rank", shape=image.held, side=side), hyper, image),
            **lazy_spec(hyper),
        }
        if side != "right":
            spec["left"] = StateSpec(kind="replicated", shape=(matrix.shape[0], rank))
        if side != "left":
            spec["right"] = StateSpec(kind="replicated", shape=(matrix.shape[1], rank))
        return spec

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        hyper, params = self.hyper_of(group), group["params"]
        clamped = 0
        for name, param in members_with_names(group, 0):
            if is_projected(self._layouts[param], hyper):
                clamped += rank_of(self._layouts[param], hyper, name) < hyper.rank
        if clamped:
            logger.info(
                "%s: %d of the %d parameters of a group with rank=%d have a side below it, which is their rank then",
                type(self).__name__,
                clamped,
                len(params),
                hyper.rank,
            )
        vectors = sum(param.dim() < 2 for param in params)
        if hyper.rank is not None and vectors:
            logger.info(
                "%s: %d of the %d parameters of a group with rank=%d have fewer than two dims and are not projected",
                type(self).__name__,
                vectors,
                len(params),
                hyper.rank,
            )

    def wants_low_rank(self, layout: Layout, state: State, hyper: Any, key: int) -> LowRankGradient | None:
        if not is_projected(layout, hyper) or self.refresh_due(state, hyper, key):
            return None
        matrix, side, rank = plan_of(layout, hyper)
        left, right = (state.get(name) for name in BASES)
        return LowRankGradient(layout=matrix, side=side, rank=rank, left=left, right=right)


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
