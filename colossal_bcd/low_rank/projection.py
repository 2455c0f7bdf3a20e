"""Which gradients are projected, and how: the options of GaLore and GoLore."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from colossal_bcd.low_rank.projector import Method
from colossal_bcd.optim.options import Hyper, require
from colossal_bcd.sharding import Layout, LowRank, low_rank_of
from colossal_bcd.sharding.low_rank import side_of

ProjectionType = Literal["std", "reverse_std", "left", "right", "full"]


@dataclass(frozen=True, kw_only=True)
class Projection(Hyper):
    """How gradients are projected: `GaLoreAdamW(params, projection=Projection(rank=128, gap=200))`."""

    rank: int | None = None
    """Rank of the projection of tensors of two or more dims (the first dim by the rest); None projects nothing."""
    gap: int = field(default=200, metadata={"key": "update_proj_gap"})
    """Steps between refreshes of the projector; the first step is one.  Groups have it as `update_proj_gap`."""
    svd_method: Method = "exact"
    """"exact" singular vectors, "subspace" iteration from the last bases, or "random" bases."""
    random_from_step: int | None = None
    """Refreshes from this step on (counted from 0) draw random bases (GoLore); None: never."""
    reproject_momentum: bool = False
    """Carry the first moment over to the new bases at a refresh (GoLore) instead of leaving it as it is (GaLore)."""
    stagger: int = 1
    """Steps of every gap over which the group's refreshes are spread, by their cost; 1: all in the same step.  The
    first step refreshes everything in any case."""
    lazy_threshold: float | None = None
    """Similarity (see `similarity`) of successive subspaces from which a refresh counts as stable, in (0, 1]; stable
    layers are refreshed less often, as in Q-GaLore (arXiv 2407.08296; 0.4 there).  None: no layer is."""
    lazy_patience: int = 5
    """Successive stable refreshes that double a layer's gap; a refresh that is not stable restores it."""
    clamp: bool = False
    """Project a matrix with a side below `rank` with that side as its rank, instead of refusing it."""
    scale: float = 0.25
    """Factor of the projected update."""
    proj_type: ProjectionType = "std"
    """Which dim is projected: "std" the shorter one of the global matrix, "reverse_std" the longer one, or as said."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        require(self.rank is None or (whole and self.rank >= 1), "rank", self.rank, "None or a positive integer")
        gap = self.gap
        require(gap >= 1, "update_proj_gap", gap, "a positive number of steps")
        methods = ("exact", "subspace", "random")
        require(self.svd_method in methods, "svd_method", self.svd_method, f"one of {', '.join(methods)}")
        start = self.random_from_step
        require(start is None or start >= 0, "random_from_step", start, "None or a step, 0 or more")
        is_number = isinstance(self.stagger, int) and not isinstance(self.stagger, bool)
        expected = f"a number of steps from 1 to update_proj_gap={gap}"
        require(is_number and 1 <= self.stagger <= gap, "stagger", self.stagger, expected)
        threshold = self.lazy_threshold
        require(threshold is None or 0 < threshold <= 1, "lazy_threshold", threshold, "None or a number in (0, 1]")
        require(
            threshold is None or self.svd_method != "random",
            "lazy_threshold",
            threshold,
            'None with svd_method="random", whose bases have nothing in common with the last ones',
        )
        require(self.lazy_patience >= 1, "lazy_patience", self.lazy_patience, "a positive number of refreshes")
        require(self.scale >= 0, "scale", self.scale, "a non-negative number")
        names = ("std", "reverse_std", "left", "right", "full")
        require(self.proj_type in names, "proj_type", self.proj_type, f"one of {', '.join(names)}")


def is_projected(layout: Layout, hyper: Projection) -> bool:
    """Whether a parameter of this layout is projected."""
    return hyper.rank is not None and len(layout.shape) >= 2


def low_rank_layout(layout: Layout, hyper: Projection) -> LowRank:
    """The layout of a projected parameter's low-rank gradient."""
    matrix = layout.as_matrix()
    return low_rank_of(matrix, side_of(matrix.shape, hyper.proj_type), rank_of(layout, hyper))


def rank_of(layout: Layout, hyper: Projection, name: str = "") -> int:
    """The rank of a projected parameter.

    Raises:
        ValueError: a side of its matrix is shorter, and `clamp` is off.
    """
    assert hyper.rank is not None
    shape = layout.as_matrix().shape
    if hyper.rank > min(shape) and not hyper.clamp:
        raise ValueError(
            f"rank={hyper.rank} for parameter {name}{' ' * bool(name)}of shape {layout.shape}, expected at most "
            f"{min(shape)}. Give it a group with a smaller rank or none, or pass clamp=True."
        )
    return min(hyper.rank, *shape)
