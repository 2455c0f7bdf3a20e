"""Refreshes of the bases of GaLore and GoLore: when, by which rank, and what they do to the state."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from colossal_bcd.optim.projection import Bases, random_bases, singular_bases, subspace_bases
from colossal_bcd.sharding import Collect, Layout, ShardView, Sum

if TYPE_CHECKING:
    from colossal_bcd.optim.base import State
    from colossal_bcd.optim.galore import GaLoreHyper

BASES = ("left", "right")


def refresh_due(state: State, hyper: GaLoreHyper, key: int) -> bool:
    """Whether the update numbered `state["step"]` refreshes the bases.

    Engines ask before the gradient is there, so the answer follows from what all ranks hold alike: plain numbers of the
    state, hyper-parameters, and the parameter's number.

    Args:
        state: of the parameter, with the number of the update in question, from 1.
        hyper: of its group.
        key: the parameter's number.
    """
    return bool((state["step"] - 1) % hyper.update_proj_gap == 0)


def refresh(
    view: ShardView, state: State, hyper: GaLoreHyper, side: str, owner: int, momentum: str = "exp_avg"
) -> Generator[tuple[Collect | Sum, ...], tuple[Any, ...], None]:
    """New bases, in place, and the first moment carried over to them if asked for.

    Random bases are drawn by every rank.  Singular vectors are computed by the owner from the whole gradient; where
    that is not finite, or the decomposition fails, the bases stay as they are (random ones at the first refresh).
    The entry `momentum` of the state is the first moment, if the inner rule has one.
    """
    layout, rank = view.layout.as_matrix(), rank_of(view.layout, hyper)
    number = (state["step"] - 1) // hyper.update_proj_gap
    seed = zlib.crc32(repr((hyper.seed, view.key, number)).encode()) * 4
    late = hyper.random_from_step is not None and state["step"] - 1 >= hyper.random_from_step
    old: dict[str, Tensor] = {name: state[name].clone() for name in BASES if name in state}
    if late or hyper.svd_method == "random":
        bases = random_bases(layout.shape, rank, side, seed, view.param)
        new = {name: basis for name, basis in zip(BASES, bases, strict=True) if basis is not None}
    else:
        (whole,) = yield (Collect(view.grad, layout, owner),)
        new = {name: torch.zeros_like(basis) for name, basis in old.items()}
        if whole is not None:
            new = bases_of(whole, rank, side, hyper.svd_method, old if number else None, seed)
        totals = yield tuple(Sum(new[name], layout.axes) for name in old)
        new = dict(zip(old, totals, strict=True))
    for name, basis in new.items():
        state[name].copy_(basis)
    if hyper.reproject_momentum and number and momentum in state:
        moment = state[momentum]
        if "left" in new:
            moment.copy_(new["left"].T @ old["left"] @ moment)
        if "right" in new:
            moment.copy_(moment @ (old["right"].T @ new["right"]))


def bases_of(
    matrix: Tensor, rank: int, side: str, method: str, old: Mapping[str, Tensor] | None, seed: int
) -> dict[str, Tensor]:
    """Bases from a whole gradient [R, C], by name, with the fallback that `refresh` states."""
    last: Bases = (None, None) if old is None else (old.get("left"), old.get("right"))
    bases: Bases | None = None
    if bool(matrix.isfinite().all()):
        try:
            if method == "exact":
                bases = singular_bases(matrix, rank, side)
            else:
                bases = subspace_bases(matrix, rank, side, last, seed)
        except torch.linalg.LinAlgError:
            bases = None
    if bases is None:
        bases = random_bases((matrix.shape[0], matrix.shape[1]), rank, side, seed, matrix) if old is None else last
    return {name: basis for name, basis in zip(BASES, bases, strict=True) if basis is not None}


def rank_of(layout: Layout, hyper: GaLoreHyper, name: str = "") -> int:
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
