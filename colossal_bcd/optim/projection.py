"""Bases of low-rank projections: singular vectors, subspace iteration, and uniform draws.

R, C: shape of the matrix; q: rank of the basis, with orthonormal columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Method = Literal["exact", "subspace", "random"]
Bases = tuple[Tensor | None, Tensor | None]


def singular_bases(matrix: Tensor, rank: int, side: str) -> Bases:
    """Leading singular vectors (arXiv 2403.03507, algorithm 2).

    Args:
        matrix: [R, C].
        rank: q.
        side: "left", "right" or "full".
    Returns:
        Left basis [R, q] and right basis [C, q]; None where the side needs none.
    """
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    left = u[:, :rank].contiguous() if side != "right" else None
    right = vh[:rank].T.contiguous() if side != "left" else None
    return left, right


def subspace_bases(matrix: Tensor, rank: int, side: str, start: Bases, seed: int, iterations: int = 2) -> Bases:
    """Leading singular vectors by subspace iteration with QR and a Rayleigh-Ritz step (Halko et al., arXiv 0909.4061).

    Args:
        matrix: [R, C].
        rank: q.
        side: "left", "right" or "full".
        start: the last bases, from which the iteration starts; None: a Gaussian.
        seed: of the Gaussian and of the 16 vectors by which the subspace is larger than q.
        iterations: multiplications by the matrix and its transpose; captured energy grows with them.
    """
    transposed = side == "left"
    work = matrix.T if transposed else matrix  # the basis sought is that of work's columns' space, [columns, q]
    width = min(rank + 16, *work.shape)
    block = gaussian((work.shape[1], width), seed, matrix)
    previous = start[0] if transposed else start[1]
    if previous is not None:
        block[:, :rank] = previous
    for _ in range(iterations):
        left = torch.linalg.qr(work @ block).Q
        block = torch.linalg.qr(work.T @ left).Q
    u, _, vh = torch.linalg.svd(work @ block, full_matrices=False)
    right = (block @ vh.T)[:, :rank].contiguous()
    other = u[:, :rank].contiguous()
    if side == "full":
        return other, right
    return (right, None) if transposed else (None, right)


def random_bases(shape: tuple[int, ...], rank: int, side: str, seed: int, like: Tensor) -> Bases:
    """Bases uniform on the Stiefel manifold (arXiv 2410.11289, section 4): E[Q Q^T] = (q / n) I.

    The QR decomposition of a Gaussian with a positive diagonal of R has that law; it is computed in float64, so that
    float32 and float64 runs agree.
    """
    left = stiefel(shape[0], rank, seed, like) if side != "right" else None
    right = stiefel(shape[1], rank, seed + 1, like) if side != "left" else None
    return left, right


def stiefel(size: int, rank: int, seed: int, like: Tensor) -> Tensor:
    """[size, rank] with orthonormal columns, a pure function of the seed; dtype and device of `like`."""
    draw = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(draw)
    return (q * r.diagonal().sgn()).to(like)


def gaussian(shape: tuple[int, int], seed: int, like: Tensor) -> Tensor:
    """Standard normal values, a pure function of the seed; dtype and device of `like`."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(like)


def captured_energy(matrix: Tensor, bases: Bases) -> Tensor:
    """|projected|^2 / |matrix|^2 of a [R, C] matrix, a scalar in [0, 1]."""
    image = matrix if bases[0] is None else bases[0].T @ matrix
    image = image if bases[1] is None else image @ bases[1]
    return image.square().sum() / matrix.square().sum()
