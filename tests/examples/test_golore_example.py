"""The non-convergence experiment: the problem, the runs in short, and what the program leaves."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from nonconvergence import main
from quadratic import GAP, INNERS, METHODS, Point, Problem, Run, noises, trace
from torch import Tensor

STEPS = {"adamw": 3000, "sgd": 3000}


def objective(x: Tensor, shift: Tensor) -> Tensor:
    """The paper's f, as it is written there."""
    top = torch.eye(6, 10, dtype=x.dtype) @ x
    return top.square().sum() / 2 + (shift * x[:6, :6]).sum()


@functools.cache
def ends(inner: str, method: str, reproject: bool = True) -> list[Point]:
    run = Run(inner=inner, method=method, steps=STEPS[inner], seed=42, reproject=reproject)
    return trace(run, lambda point: None)


def test_nonconvergence_problem_is_the_papers() -> None:
    problem = Problem(42)
    torch.manual_seed(42)
    shift, bottom = torch.randn(6, 6).double(), torch.randn(4, 10).double()
    start = torch.cat([torch.eye(6, 10, dtype=torch.float64) / 2, bottom])
    assert torch.equal(problem.x, start)
    x = start.clone().requires_grad_()
    value = objective(x, shift)
    value.backward()
    noise = torch.zeros(10, 10, dtype=torch.float64)
    noise[range(6, 10), range(6, 10)] = -1.0
    problem.set_gradient(-1.0)
    torch.testing.assert_close(problem.x.grad, x.grad + noise, rtol=0, atol=1e-12)
    point = problem.point(0)
    assert point.gap == pytest.approx(value.item() + shift.square().sum().item() / 2, abs=1e-12)
    assert point.gradient == pytest.approx(x.grad.norm().item(), abs=1e-12)
    assert point.singular == pytest.approx(torch.linalg.svdvals(x.grad).max().item(), abs=1e-12)


def test_nonconvergence_large_batch_averages_the_noise_of_refreshes_only() -> None:
    small, large = (
        torch.tensor(noises(Run(inner="sgd", method=name, steps=5000, seed=1)))
        for name in ("galore", "galore_large_batch")
    )
    assert set(small.tolist()) == {-1.0, 1.0}
    refresh = torch.arange(5000) % GAP == 0
    assert torch.equal(small[~refresh], large[~refresh])
    # Means of 100 signs have the deviation 0.1: six of them bound the 50 refreshes.
    assert 0.05 < large[refresh].std() < 0.15
    assert large[refresh].abs().max() <= 0.6


def test_nonconvergence_full_sgd_follows_its_closed_form() -> None:
    """The noise never reaches the rows that f sees: the gap shrinks by (1 - lr)^2 a step."""
    points = ends("sgd", "full")
    lr = 3e-5 * INNERS["sgd"].steps / STEPS["sgd"]
    for point in (points[1], points[-1]):
        assert point.gap == pytest.approx(points[0].gap * (1 - lr) ** (2 * point.step), rel=1e-9)


@pytest.mark.parametrize(("inner", "factor"), [("adamw", 4.0), ("sgd", 15.0)])
def test_nonconvergence_galore_stalls_above_golore(inner: str, factor: float) -> None:
    """At the paper's length the factors are 31 and 35."""
    galore, golore, large_batch = (ends(inner, name) for name in ("galore", "golore", "galore_large_batch"))
    assert galore[-1].gap > 1.9
    assert galore[-1].gap > factor * golore[-1].gap
    assert galore[-1].gap > 2.5 * large_batch[-1].gap
    # Until its bases are random GoLore is GaLore, up to the moment that it carries over.
    begin = INNERS[inner].rand_ratio * STEPS[inner]
    for mine, theirs in zip(galore, golore, strict=True):
        if mine.step <= begin:
            assert mine.gap == pytest.approx(theirs.gap, rel=0.05)


def test_nonconvergence_galore_stands_still_below_the_noise() -> None:
    """All singular values under the noise's: the singular vectors are the noise's and f does not move at all."""
    points = ends("sgd", "galore")
    stalled = next(index for index, point in enumerate(points) if point.singular < 1)
    # The bases of the current period were chosen before.
    settled = [point for point in points if point.step >= points[stalled].step + GAP]
    assert len(settled) > len(points) // 2
    for point in settled:
        assert point.gap == pytest.approx(settled[0].gap, rel=1e-12)


def test_nonconvergence_carried_moment_helps_golore() -> None:
    """Without it, as in the code published with the paper, AdamW's moment is in the old bases' coordinates."""
    carried, left = ends("adamw", "golore"), ends("adamw", "golore", reproject=False)
    assert carried[-1].gap < 0.9 * left[-1].gap


PAGE = Path(__file__).parents[2] / "docs/golore.md"
ROWS = {
    cells[0]: [cell.strip("*") for cell in cells[1:]]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split(" | ")]) == 7
}
"""Of the table of figures: first cell -> the others."""


def figures(inner: str, method: str, reproject: bool = True) -> list[float]:
    """The figures of a run of the paper's length."""
    run = Run(inner=inner, method=method, steps=INNERS[inner].steps, seed=42, reproject=reproject)
    last = trace(run, lambda point: None)[-1]
    return [last.gap, last.gradient, last.singular]


def of_the_page(title: str, inner: str) -> list[float]:
    return [float(cell) for cell in (ROWS[title][:3] if inner == "adamw" else ROWS[title][3:])]


def test_nonconvergence_figures_of_sgd_on_all_parameters_are_those_of_the_page() -> None:
    """These have a closed form, and the page has two digits of them."""
    problem, steps = Problem(42), INNERS["sgd"].steps
    start = problem.point(0)
    factor = (1 - 3e-5) ** steps
    expected = [start.gap * factor**2, start.gradient * factor, start.singular * factor]
    assert of_the_page("full parameters", "sgd") == pytest.approx(expected, rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("method", METHODS)
def test_nonconvergence_figures_are_those_of_the_page(inner: str, method: str) -> None:
    # Two or three digits; the last ones are the machine's.
    expected = of_the_page(METHODS[method].title, inner)
    assert figures(inner, method) == pytest.approx(expected, rel=0.03)


@pytest.mark.full
def test_nonconvergence_figures_without_the_carried_moment_are_those_of_the_page() -> None:
    expected = of_the_page("GoLore, moment not carried over", "adamw")
    assert figures("adamw", "golore", reproject=False) == pytest.approx(expected, rel=0.03)


def test_nonconvergence_program_leaves_csv_and_picture(tmp_path: Path) -> None:
    arguments = ["--steps", "200", "--seed", "3", "--output", str(tmp_path / "out")]
    outcome = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    with (tmp_path / "out" / "gaps.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optimizer"], row["method"]) for row in rows[::201]] == [(i, m) for i in INNERS for m in METHODS]
    assert [int(row["step"]) for row in rows[:201]] == list(range(201))
    for row in rows:
        assert float(row["gap"]) == pytest.approx(float(row["gradient_norm"]) ** 2 / 2, rel=1e-9)
    assert (tmp_path / "out" / "gaps.png").read_bytes().startswith(b"\x89PNG")
    assert "GoLore" in outcome.output


def test_nonconvergence_program_runs_one_inner_rule(tmp_path: Path) -> None:
    arguments = ["--optimizer", "sgd", "--steps", "100", "--output", str(tmp_path)]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    with (tmp_path / "gaps.csv").open(encoding="utf-8") as file:
        assert {row["optimizer"] for row in csv.DictReader(file)} == {"sgd"}
