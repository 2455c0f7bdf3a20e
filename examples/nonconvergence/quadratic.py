"""The counterexample of arXiv 2410.11289, and its runs: a quadratic over 10x10 matrices, X.

Its noise lives where the gradient vanishes.  Once the gradient's singular values fall below the noise, the singular
vectors at a refresh are the noise's, and nothing that matters is updated any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from colossal_bcd import GaLoreAdamW
from colossal_bcd.low_rank.projector import random_bases, singular_bases

SIZE, RANK, GAP, SIGMA, LR = 10, 4, 100, 1.0, 3e-5
TOP = SIZE - RANK
DRAWS = 100
"""Noise draws whose mean a large batch sees at a refresh."""
POINTS = 500
"""Of each curve."""


@dataclass(frozen=True)
class Inner:
    """An inner rule as the paper runs it."""

    title: str
    steps: int
    rand_ratio: float
    """Fraction of the steps after which GoLore's bases are random."""


@dataclass(frozen=True)
class Method:
    """A curve."""

    title: str
    color: str
    projected: bool = True
    large_batch: bool = False
    late_random: bool = False


INNERS = {"adamw": Inner("AdamW", 100_000, 0.5), "sgd": Inner("SGD", 200_000, 0.25)}
METHODS = {
    "full": Method("full parameters", "0.45", projected=False),
    "galore": Method("GaLore", "tab:red"),
    "galore_large_batch": Method("GaLore, large batch", "tab:orange", large_batch=True),
    "golore": Method("GoLore", "tab:blue", late_random=True),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one curve is made with."""

    inner: str
    method: str
    steps: int
    seed: int
    reproject: bool = True
    """GoLore carries its first moment over to new bases (AdamW)."""

    @property
    def lr(self) -> float:
        """The paper's, times what the run is shorter than the paper's."""
        return LR * INNERS[self.inner].steps / self.steps


@dataclass(frozen=True)
class Point:
    """Where a run is after `step` steps."""

    step: int
    gap: float
    """f(X) - min f."""
    gradient: float
    """Norm of the gradient without noise."""
    singular: float
    """Its largest singular value."""


class Problem:
    """min f(X) = |T|^2 / 2 + <D, T's first 6 columns>, T the first 6 rows of X; noise on its last 4 rows and columns.

    The minimum is -|D|^2 / 2, so that the gradient T + [D 0] has the norm sqrt(2 (f - min f)).

    Args:
        seed: of D and of the first X.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shift = SIGMA * torch.randn(TOP, TOP, generator=generator)
        self._shift = torch.cat([shift, torch.zeros(TOP, RANK)], dim=1).double()
        bottom = SIGMA * torch.randn(RANK, SIZE, generator=generator)
        # In float32 the last steps of a run, 1e-7 of a weight, would be lost to rounding.
        self.x = torch.nn.Parameter(torch.cat([SIGMA / 2 * torch.eye(TOP, SIZE), bottom]).double())
        self.x.grad = torch.zeros_like(self.x)
        # Views, made once: a step of a 10x10 matrix is all overhead.
        self._top, self._gradient = self.x.detach()[:TOP], self.x.grad[:TOP]
        self._noise = self.x.grad.diagonal()[TOP:]

    def set_gradient(self, noise: float) -> None:
        """Leave the gradient at X, with noise * I in the corner, in `x.grad`."""
        torch.add(self._top, self._shift, out=self._gradient)
        self._noise.fill_(noise)

    def point(self, step: int) -> Point:
        gradient = self._top + self._shift
        norm = gradient.norm().item()
        return Point(step, norm**2 / 2, norm, torch.linalg.matrix_norm(gradient, 2).item())


def noises(run: Run) -> list[float]:
    """The noise of each step: +-sigma, and for a large batch the mean of 100 such draws at each refresh."""
    generator = torch.Generator().manual_seed(run.seed + 1)
    values = SIGMA * (2.0 * torch.randint(2, (run.steps,), generator=generator) - 1)
    if METHODS[run.method].large_batch:
        refreshes = values[::GAP]
        draws = 2.0 * torch.randint(2, (len(refreshes), DRAWS), generator=generator) - 1
        refreshes.copy_(SIGMA * draws.mean(dim=1))
    return values.tolist()


def stepper(run: Run, x: torch.nn.Parameter) -> Callable[[], object]:
    """What makes one step on `x.grad`."""
    method, inner = METHODS[run.method], INNERS[run.inner]
    if not method.projected and run.inner == "adamw":
        return torch.optim.AdamW([x], lr=run.lr, foreach=False).step
    if not method.projected:
        return torch.optim.SGD([x], lr=run.lr, foreach=False).step
    begin = math.ceil(inner.rand_ratio * run.steps) if method.late_random else None
    if run.inner == "sgd":
        return ProjectedSGD(x, run.lr, begin, run.seed).step
    return GaLoreAdamW(
        [x],
        lr=run.lr,
        rank=RANK,
        update_proj_gap=GAP,
        scale=1.0,
        proj_type="left",
        random_from_step=begin,
        reproject_momentum=method.late_random and run.reproject,
        seed=run.seed,
    ).step


class ProjectedSGD:
    """SGD on the left projection of one matrix's gradient: the paper's inner rule without moments.

    Args:
        x: the matrix.
        lr: step size.
        random_from: refreshes from this step on draw random bases; None: never.
        seed: of these.
    """

    def __init__(self, x: torch.nn.Parameter, lr: float, random_from: int | None, seed: int) -> None:
        self._x, self._lr, self._random_from = x, lr, random_from
        self._seeds = torch.Generator().manual_seed(seed)
        self._basis: Tensor | None = None
        self._step = 0

    @torch.no_grad()
    def step(self) -> None:
        gradient = self._x.grad
        assert gradient is not None
        if self._step % GAP == 0:
            if self._random_from is not None and self._step >= self._random_from:
                seed = int(torch.randint(2**31, (), generator=self._seeds))
                self._basis, _ = random_bases((SIZE, SIZE), RANK, "left", seed, gradient)
            else:
                self._basis, _ = singular_bases(gradient, RANK, "left")
        assert self._basis is not None
        self._x.sub_(self._basis @ (self._basis.T @ gradient), alpha=self._lr)
        self._step += 1


def trace(run: Run, show: Callable[[Point], None]) -> list[Point]:
    """Make a run.

    Args:
        run: which.
        show: called with each point.
    """
    problem = Problem(run.seed)
    step = stepper(run, problem.x)
    points = [problem.point(0)]
    every = max(run.steps // POINTS, 1)
    for number, noise in enumerate(noises(run), start=1):
        problem.set_gradient(noise)
        step()
        if number % every == 0 or number == run.steps:
            points.append(problem.point(number))
            show(points[-1])
    return points
