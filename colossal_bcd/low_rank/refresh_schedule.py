"""When bases are refreshed, and by which rank: pure functions of keys, global shapes and hyper-parameters.

Steps are counted from 0 here.  A matrix with offset o is refreshed at step 0 and whenever step + o is a multiple of the
gap, so that no basis grows older than the gap; the j-th such step is refresh number j.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from colossal_bcd.low_rank.projection import Projection
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.low_rank import cost_of_basis
from colossal_bcd.sharding.packing import least_loaded

REFRESH_AT, REFRESH_WAIT, REFRESH_STABLE = "refresh_at", "refresh_wait", "refresh_stable"
"""Integers of the state where refreshes are lazy: number of the next refresh, gaps from the last one to it, and
successive refreshes that found the subspace stable."""


@dataclass(frozen=True)
class Matrix:
    """What the schedule knows of one projected parameter, on this rank or not."""

    key: int
    cost: int
    """Operations of a refresh, up to a factor."""
    gap: int
    stagger: int

    @classmethod
    def of(cls, key: int, shape: tuple[int, ...], hyper: Projection) -> Matrix:
        """What it knows of a global matrix [R, C]."""
        assert hyper.rank is not None
        short = min(shape)
        # Decompositions cost about 20 R C min(R, C) operations; five products with a basis and as many for their QR
        # decompositions about 10 R C times its width.
        width = min(hyper.rank + 16, short)
        cost = {"exact": 2 * cost_of_basis(shape), "subspace": math.prod(shape) * width}
        return cls(key, cost.get(hyper.svd_method, sum(shape) * hyper.rank), hyper.gap, hyper.stagger)


@dataclass(frozen=True)
class RefreshTurn:
    """Where and when the bases of one parameter are refreshed, and where the refresh leaves its report."""

    owner: int
    """Rank that computes them, as `Collect` counts."""
    offset: int
    reports: dict[int, Tensor]
    """[2] captured energy and similarity by key, of this step's refreshes."""


def offsets(matrices: Iterable[Matrix]) -> dict[int, int]:
    """Offsets by key.

    Matrices of equal gap and stagger are spread over steps at equal distances within the gap, the costliest first, each
    to the step with least to do.  Every rank and mesh must pass the same matrices: those of the whole model.
    """
    classes: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        classes.setdefault((matrix.gap, matrix.stagger), []).append(matrix)
    found = {}
    for (gap, stagger), members in classes.items():
        num_steps = min(stagger, len(members))
        steps = least_loaded({matrix.key: matrix.cost for matrix in members}, num_steps)
        found.update({key: -(step * gap // num_steps) % gap for key, step in steps.items()})
    return found


def owners(matrices: Mapping[int, Matrix], layouts: Mapping[int, Layout], offset: Mapping[int, int]) -> dict[int, int]:
    """Owners by key: of the matrices that are refreshed in the same step each to the rank with least to do.

    All matrices, of which this rank has parts, are refreshed together in the first step, so among ranks with equally
    much to do in a step the one with least to do in all is chosen.
    """

    def num_ranks(key: int) -> int:
        layout = layouts[key]
        return math.prod(axis.size for axis in (layout.slice, layout.split) if axis is not None)

    costs = {key: matrix.cost for key, matrix in matrices.items()}
    return least_loaded(costs, num_ranks, lambda key: (matrices[key].gap, offset[key]))


def is_random(step: int, hyper: Projection) -> bool:
    """Whether a refresh at this step draws random bases."""
    late = hyper.random_from_step is not None and step >= hyper.random_from_step
    return late or hyper.svd_method == "random"


def number_of(step: int, hyper: Projection, offset: int) -> int:
    """Number of the last refresh up to this step if none is skipped."""
    return (step + offset % hyper.gap) // hyper.gap


def is_due(step: int, state: Mapping[str, Any], hyper: Projection, offset: int) -> bool:
    """Whether the bases are refreshed at this step: known on the host, before the step, on every rank alike."""
    if step == 0:
        return True
    if (step + offset) % hyper.gap:
        return False
    if hyper.lazy_threshold is None or is_random(step, hyper):
        return True
    return bool(number_of(step, hyper, offset) >= state.get(REFRESH_AT, 0))


def lazy_spec(hyper: Projection) -> dict[str, StateSpec]:
    """State of lazy refreshes; empty where they are not asked for."""
    if hyper.lazy_threshold is None:
        return {}
    return {name: StateSpec(kind="scalar") for name in (REFRESH_AT, REFRESH_WAIT, REFRESH_STABLE)}


def settle(state: dict[str, Any], hyper: Projection, offset: int, similarity: float) -> None:
    """Say when the refresh after the one of the step just taken is due.

    Args:
        state: of the parameter; its `step` counts the step just taken.
        hyper: with a `lazy_threshold`.
        offset: that of its turn.
        similarity: of the bases before and after; not a number where there is nothing to compare.
    """
    assert hyper.lazy_threshold is not None
    if similarity >= hyper.lazy_threshold:
        state[REFRESH_STABLE] += 1
        if state[REFRESH_STABLE] == hyper.lazy_patience:
            state[REFRESH_WAIT], state[REFRESH_STABLE] = 2 * state[REFRESH_WAIT], 0
    else:
        state[REFRESH_WAIT], state[REFRESH_STABLE] = 1, 0
    state[REFRESH_AT] = number_of(state["step"] - 1, hyper, offset) + state[REFRESH_WAIT]
