"""Refreshes of the bases of GaLore and GoLore: what they compute and what they do to the state."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from colossal_bcd.low_rank.projection import Projection
from colossal_bcd.low_rank.projector import (
    Bases,
    captured_energy,
    random_bases,
    random_energy,
    similarity,
    singular_bases,
    subspace_bases,
)
from colossal_bcd.low_rank.refresh_schedule import RefreshTurn, is_random, number_of
from colossal_bcd.optim.state.spec import State
from colossal_bcd.sharding import Collect, LowRank, Rounds, ShardView, Sum, wide
from colossal_bcd.sharding.low_rank import Side

BASES = ("left", "right")


def refresh(
    view: ShardView,
    state: State,
    hyper: Projection,
    low_rank: LowRank,
    turn: RefreshTurn,
    momentum: str,
    seed: int,
) -> Rounds:
    """Give one matrix new bases, in place, and carry its first moment over to them if asked for.

    Random bases are drawn by every rank.  Singular vectors are computed by the owner from the whole gradient; where
    that is not finite, or the decomposition fails, the bases stay as they are (random ones at the first refresh).  The
    owner's report travels with the bases, so that decisions about later refreshes are the same on every rank.

    Args:
        view: of the parameter; a stack of one.
        state: of the parameter.
        hyper: of its group.
        low_rank: layout of its low-rank gradient.
        turn: who computes the bases.
        momentum: entry of the state that is the first moment, if the inner rule has one.
        seed: of the group.
    """
    step, layout, side, rank = state.step - 1, low_rank.layout, low_rank.side, low_rank.rank
    number = number_of(step, hyper, turn.offset)
    seed = zlib.crc32(repr((seed, view.keys[0], number)).encode()) * 4
    old: dict[str, Tensor] = {name: state[name].view(state[name].shape[-2:]).clone() for name in BASES if name in state}
    if is_random(step, hyper):
        # In the dtype of the arithmetic: bases that are rounded to bfloat16 are not orthonormal.
        like = view.param.new_empty(0, dtype=wide(view.param.dtype))
        new = _by_name(random_bases(layout.shape, rank, side, seed, like))
        sample = next(iter(new.values()))
        expected = random_energy(layout.shape, rank, side)
        report = torch.stack([sample.new_full((), value) for value in (expected, float("nan"))])
    else:
        (whole,) = yield (Collect(view.grad.reshape(-1), layout, turn.owner),)
        new = {name: torch.zeros_like(basis) for name, basis in old.items()}
        report = next(iter(new.values())).new_zeros(2)
        if whole is not None:
            new, report = bases_of(whole, rank, side, hyper.svd_method, old if step else None, seed)
            del whole
        totals = yield tuple(Sum(value, layout.axes) for value in (*(new[name] for name in old), report))
        new, report = dict(zip(old, totals[:-1], strict=True)), totals[-1]
    # A copy, as it is a view of the round's whole buffer, which has all bases and would stay alive.
    turn.reports[view.keys[0]] = report.clone()
    for name, basis in new.items():
        state[name].copy_(basis)
    if hyper.reproject_momentum and step and momentum in state:
        moment = low_rank.matrix(state[momentum])
        if "left" in new:
            moment.copy_(new["left"].T @ old["left"] @ moment)
        if "right" in new:
            moment.copy_(moment @ (old["right"].T @ new["right"]))


def bases_of(
    matrix: Tensor, rank: int, side: Side, method: str, old: Mapping[str, Tensor] | None, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Bases from a whole gradient [R, C], with the fallback that `refresh` states.

    Args:
        matrix: [R, C].
        rank: q.
        side: which sides are projected.
        method: "exact" or "subspace".
        old: bases by name; None at the first refresh.
        seed: of random starts and bases.
    Returns:
        Bases by name, and [2] the energy that they capture and their similarity to the old ones, each not a number
        where it is not known: that of a gradient that is not finite, and that to bases that did not change or are none.
    """
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
    alike = matrix.new_full((), float("nan")) if bases is None or old is None else similarity(last, bases)
    if bases is None:
        bases = random_bases((matrix.shape[0], matrix.shape[1]), rank, side, seed, matrix) if old is None else last
    return _by_name(bases), torch.stack([captured_energy(matrix, bases), alike])


def _by_name(bases: Bases) -> dict[str, Tensor]:
    return {name: basis for name, basis in zip(BASES, bases, strict=True) if basis is not None}
