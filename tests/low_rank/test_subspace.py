"""Subspace iteration: orthonormal bases that capture what singular vectors do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refresh import noisy_gradients, real_gradients

from colossal_bcd.low_rank.projector import captured_energy, random_energy, signed, singular_bases, subspace_bases

SIDES = ("left", "right", "full")


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(SIDES), st.booleans(), st.data())
def test_subspace_bases_are_orthonormal(rows: int, columns: int, side: str, warm: bool, data: st.DataObject) -> None:
    """Of any shape, up to rank min(R, C), of matrices that have fewer dimensions, and of zero."""
    rank = data.draw(st.integers(1, min(rows, columns)))
    inner = data.draw(st.integers(0, min(rows, columns)))
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    draws = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, inner), (inner, columns))
    ]
    matrix = draws[0] @ draws[1]
    start = singular_bases(matrix + 1, rank, side) if warm else (None, None)
    bases = subspace_bases(matrix, rank, side, start, seed=3)
    assert [basis is not None for basis in bases] == [side != "right", side != "left"]
    for basis, size in zip(bases, (rows, columns), strict=True):
        if basis is not None:
            assert basis.shape == (size, rank)
            assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-9)
    if inner <= rank and inner:
        assert captured_energy(matrix, bases).item() == pytest.approx(1, abs=1e-9)


def test_subspace_bases_of_a_small_side_are_exact() -> None:
    """Where the 16 additional vectors reach the side, the iteration has the whole space."""
    matrix = torch.randn(20, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for side in SIDES:
        exact, ours = singular_bases(matrix, 6, side), subspace_bases(matrix, 6, side, (None, None), seed=0)
        for a, b in zip(exact, ours, strict=True):
            if a is not None and b is not None:
                assert torch.allclose(a @ a.T, b @ b.T, atol=1e-10)


def test_subspace_iteration_begins_at_the_last_bases() -> None:
    """On noise, whose spectrum has no gap, what the last bases know is not found again in so few iterations."""
    matrix = noisy_gradients((300, 300), 0, seed=0)[0]
    best = singular_bases(matrix, 20, "right")
    cold, warm = (
        captured_energy(matrix, subspace_bases(matrix, 20, "right", start, seed=1)).item()
        for start in ((None, None), best)
    )
    exact = captured_energy(matrix, best).item()
    assert cold < 0.97 * exact
    assert warm == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("shape", [(128, 128), (384, 128)], ids=str)
def test_subspace_captures_real_gradients_within_one_percent(shape: tuple[int, int]) -> None:
    """Of a language model on text, at its first step and after three."""
    for train_steps in (0, 3):
        before, matrix = real_gradients(shape, train_steps, tokens=512)
        for side in SIDES:
            best = captured_energy(matrix, singular_bases(matrix, 16, side)).item()
            for start in ((None, None), singular_bases(before, 16, side)):
                ours = captured_energy(matrix, subspace_bases(matrix, 16, side, start, seed=2)).item()
                assert 0.99 * best <= ours <= best * (1 + 1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_random_energy_is_the_mean(side: str) -> None:
    from colossal_bcd.low_rank.projector import random_bases

    matrix = noisy_gradients((9, 7), 2, seed=0)[0].double()
    draws = [captured_energy(matrix, random_bases((9, 7), 3, side, 5 * seed, matrix)) for seed in range(2000)]
    values = torch.stack(draws)
    assert abs(values.mean().item() - random_energy((9, 7), 3, side)) <= 4 * values.std().item() / len(values) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize(
    "bases", [singular_bases, lambda m, q, side: subspace_bases(m, q, side, (None, None), 0)], ids=["exact", "subspace"]
)
def test_bases_have_the_signs_of_the_convention_whatever_the_library_gives(
    bases: Any, side: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Singular vectors flipped at gradient noise of 1e-16, so that two meshes had moments of opposite signs."""
    matrix = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    want = bases(matrix, 3, side)
    original = torch.linalg.svd

    def flipped(*args: Any, **kwargs: Any) -> Any:
        u, s, vh = original(*args, **kwargs)
        signs = torch.tensor([-1.0, 1.0]).to(u).repeat(len(s))[: len(s)]
        return u * signs, s, vh * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    for found, basis in zip(bases(matrix, 3, side), want, strict=True):
        assert (found is None) == (basis is None)
        assert found is None or torch.equal(found, basis)


def test_signs_stay_under_noise_where_components_are_equally_large() -> None:
    even = torch.tensor([[0.1, 0.7, -0.7, 0.1]], dtype=torch.float64).T
    for noise in (0.0, 1e-16, -1e-16, 1e-8, -1e-8):
        moved = even + noise * torch.tensor([[0.0, -1.0, -1.0, 0.0]], dtype=torch.float64).T
        assert signed(moved)[1] > 0
        assert signed(-moved)[1] > 0
