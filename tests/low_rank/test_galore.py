"""GaLore and GoLore: the global matrix is projected, on every mesh."""

from __future__ import annotations

from typing import Any

import galore_cases
import pytest
import torch
from conformance_cases import Sizes
from hypothesis import given
from hypothesis import strategies as st
from support.signs import signed_svd

from colossal_bcd import GaLoreAdamW
from colossal_bcd.low_rank.projector import captured_energy, random_bases, singular_bases, subspace_bases
from colossal_bcd.testing import run_ranks

GOLORE = {"random_from_step": 4, "reproject_momentum": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "std": {},
    "reverse_std": {"proj_type": "reverse_std"},
    "left": {"proj_type": "left", **GOLORE},
    "right": {"proj_type": "right"},
    "full": {"proj_type": "full", **GOLORE},
    "golore": GOLORE,
    "random": {"svd_method": "random"},
    "subspace": {"svd_method": "subspace"},
}


@pytest.mark.parametrize("sizes", [Sizes(1, 2), Sizes(1, 3), Sizes(2, 1), Sizes(2, 2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_galore_on_a_mesh_equals_one_process(variant: str, sizes: Sizes) -> None:
    """Through three refreshes, with square row-parallel weights, ragged rows, fused sections and padding."""
    reports = run_ranks(sizes.tp * sizes.zero, galore_cases.sharded, sizes, VARIANTS[variant])
    for report in reports:
        assert report["error"] <= 1e-12
        for mine, theirs in zip(report["bases"], reports[0]["bases"], strict=True):
            assert torch.equal(mine, theirs), "ranks hold different bases"


@pytest.mark.parametrize("sizes", [Sizes(1, 2), Sizes(2, 1), Sizes(2, 2)], ids=str)
def test_galore_makes_few_collectives(sizes: Sizes) -> None:
    """Whatever the number of matrices: at most two per axis between refreshes; a refresh adds collect and bases.

    Right projections complete rows that lie on several ranks, and spread what their first rank makes of them.
    """
    for variant, spread in (("std", 1), ("right", 1), ("full", 0)):
        report = run_ranks(sizes.tp * sizes.zero, galore_cases.sharded, sizes, VARIANTS[variant])[0]
        between = sizes.num_axes + (spread if sizes.zero > 1 else 0)
        assert report["between"] == {"all_reduce": between}
        assert report["refresh"] == {"all_reduce": between + sizes.num_axes, "all_to_all_single": sizes.num_axes}


def test_galore_golore_draws_bases_without_communication() -> None:
    report = run_ranks(2, galore_cases.sharded, Sizes(1, 2), VARIANTS["random"])[0]
    assert report["refresh"] == report["between"] == {"all_reduce": 2}


def test_galore_states_are_sharded() -> None:
    """Rows of a right projection and columns of a left one are divided over ZeRO ranks, up to boundary rows."""
    whole = run_ranks(1, galore_cases.sharded, Sizes(1, 1), {})[0]["held"]
    parts = [report["held"] for report in run_ranks(2, galore_cases.sharded, Sizes(1, 2), {})]
    for index, total in enumerate(whole):
        assert sum(part[index] for part in parts) <= total + galore_cases.RANK + 1
        if galore_cases.CASES[index].padded is not None:
            continue  # slices of the padded rows: the last one has less data
        assert max(part[index] for part in parts) <= total / 2 + galore_cases.RANK + 1


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_galore_equals_the_original(proj_type: str) -> None:
    """Against galore_torch on one process, whose decomposition is float32; separated spectra, three refreshes."""
    from galore_torch import GaLoreAdamW as Original

    def weights() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(12, 8), (8, 12), (9, 9)]
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    theirs, ours = weights(), weights()
    group = {"rank": 3, "update_proj_gap": 3, "scale": 0.25, "proj_type": proj_type}
    original = Original([{"params": theirs, **group}], lr=1e-2, weight_decay=0.1)
    optimizer = GaLoreAdamW([{"params": ours, **group}], lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        for a, b in zip(theirs, ours, strict=True):
            u, s, vh = torch.linalg.svd(torch.randn(a.shape, generator=generator), full_matrices=False)
            a.grad = u @ torch.diag(0.5 ** torch.arange(len(s))) @ vh
            b.grad = a.grad.clone()
        with signed_svd():
            original.step()
        optimizer.step()
    for a, b in zip(theirs, ours, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("step_of_nan", [0, 2])
def test_galore_keeps_its_bases_where_the_gradient_is_no_number(step_of_nan: int) -> None:
    """The owner alone sees the whole gradient: it must not raise there while the others wait."""
    reports = run_ranks(4, galore_cases.poisoned, Sizes(2, 2), step_of_nan)
    for report in reports:
        assert all(torch.equal(a, b) for a, b in zip(report["bases"], reports[0]["bases"], strict=True))
        basis = report["bases"][step_of_nan]
        assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
        if step_of_nan:
            assert torch.equal(basis, report["bases"][step_of_nan - 1])


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"rank": 9}, "rank=9 for parameter number 0 of shape \\(8, 12\\), expected at most 8"),
        ({"rank": 0}, "rank"),
        ({"rank": 2, "update_proj_gap": 0}, "update_proj_gap"),
        ({"rank": 2, "proj_type": "diagonal"}, "proj_type"),
        ({"rank": 2, "svd_method": "guess"}, "svd_method"),
    ],
)
def test_galore_refuses_what_it_cannot_do(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([torch.nn.Parameter(torch.ones(8, 12))], **hyper)


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 2**31))
def test_random_bases_are_orthonormal_and_pure(rank: int, extra: int, seed: int) -> None:
    like = torch.empty(0, dtype=torch.float64)
    left, right = random_bases((rank + extra, rank + 2), rank, "full", seed, like)
    assert left is not None
    assert right is not None
    for basis in (left, right):
        assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    again = random_bases((rank + extra, rank + 2), rank, "full", seed, like)[0]
    assert again is not None
    assert torch.equal(left, again)


def test_random_bases_are_uniform() -> None:
    """E[Q Q^T] = (q / n) I over the Stiefel manifold; a QR without the sign fix has it, too, but E[Q] != 0 then."""
    like = torch.empty(0, dtype=torch.float64)
    draws = [random_bases((6, 6), 2, "left", 7 * seed, like)[0] for seed in range(4000)]
    stack = torch.stack([draw for draw in draws if draw is not None])
    projector = torch.einsum("dnq,dmq->nm", stack, stack) / len(stack)
    assert torch.allclose(projector, torch.eye(6, dtype=torch.float64) / 3, atol=0.02)  # 5 standard errors
    assert stack.mean(0).abs().max() < 5 * (1 / 6 / len(stack)) ** 0.5


def test_subspace_iteration_captures_the_energy_of_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(96, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    matrix = low + 0.1 * torch.randn(96, 64, generator=generator)
    for side in ("left", "right", "full"):
        best = captured_energy(matrix, singular_bases(matrix, 8, side))
        ours = captured_energy(matrix, subspace_bases(matrix, 8, side, (None, None), seed=3))
        assert ours >= 0.999 * best
