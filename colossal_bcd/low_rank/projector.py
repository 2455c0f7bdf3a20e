"""Bases of low-rank projections: singular vectors, subspace iteration, and uniform draws.

R, C: shape of the matrix; q: rank of the basis, with orthonormal columns.

A singular vector is one up to its sign, and LAPACK's depends on the last bit of the matrix: `signed` decides it, so
that meshes, whose gradients differ by rounding, have the same bases, and moments that are not carried over at a refresh
meet a basis of the same signs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from colossal_bcd.sharding import square_sum

Method = Literal["exact", "subspace", "random"]
Bases = tuple[Tensor | None, Tensor | None]


TIE = 0.01
"""Components of a vector whose sizes differ by less than this part of the largest count as equally large."""


def signed(basis: Tensor) -> Tensor:
    """[n, q] with the sign of each column that makes its largest component positive, of equally large ones the first.

    Rounding can change the answer only where the size of a component is within rounding of 1 - `TIE` of the largest,
    and not where several are equally large, as symmetries make them.
    """
    sizes = basis.abs()
    # argmax takes the first of equal values.
    first = (sizes >= (1 - TIE) * sizes.amax(0)).to(torch.uint8).argmax(0, keepdim=True)
    return (basis * basis.gather(0, first).sgn()).contiguous()


def singular_bases(matrix: Tensor, rank: int, side: str) -> Bases:
    """Leading singular vectors (arXiv 2403.03507, algorithm 2), with signs of their own.

    Args:
        matrix: [R, C].
        rank: q.
        side: "left", "right" or "full".
    Returns:
        Left basis [R, q] and right basis [C, q]; None where the side needs none.
    """
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return signed(u[:, :rank]) if side != "right" else None, signed(vh[:rank].T) if side != "left" else None


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
    previous = start[0] if transposed else start[1]
    known = 0 if previous is None else rank
    block = gaussian((work.shape[1], width - known), seed, matrix)
    if previous is not None:
        block = torch.cat([previous, block], 1)
    for _ in range(iterations):
        left = torch.linalg.qr(work @ block).Q
        block = torch.linalg.qr(work.T @ left).Q
    left, small = torch.linalg.qr(work @ block)
    u, _, vh = torch.linalg.svd(small)  # [width, width]
    right, other = signed(block @ vh[:rank].T), signed(left @ u[:, :rank])
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
    draw = torch.randn(
        size, rank, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(seed)
    )
    q, r = torch.linalg.qr(draw)
    return (q * r.diagonal().sgn()).to(like)


def gaussian(shape: tuple[int, int], seed: int, like: Tensor) -> Tensor:
    """Standard normal values, a pure function of the seed; dtype and device of `like`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator).to(like)


def captured_energy(matrix: Tensor, bases: Bases) -> Tensor:
    """|projected|^2 / |matrix|^2 of a [R, C] matrix, a scalar in [0, 1]."""
    projected = matrix if bases[0] is None else bases[0].T @ matrix
    projected = projected if bases[1] is None else projected @ bases[1]
    kept, whole = square_sum(projected.reshape(-1)), square_sum(matrix.reshape(-1))
    return (kept / whole).squeeze().to(matrix.dtype)


def random_energy(shape: tuple[int, ...], rank: int, side: str) -> float:
    """Mean energy of any matrix [R, C] that `random_bases` capture: E[Q Q^T] = (q / n) I on every projected side."""
    left = rank / shape[0] if side != "right" else 1.0
    right = rank / shape[1] if side != "left" else 1.0
    return left * right


def similarity(old: Bases, new: Bases) -> Tensor:
    """How much of the old subspace is in the new one, a scalar: 1 for the same subspace, 0 on average for random ones.

    The mean squared cosine of the principal angles, |old^T new|^2 / q, less what two random subspaces have, q / n,
    and divided by what remains to 1.  Signs and rotations of the vectors do not count.  Of two sides the lower one.
    """
    values = []
    for before, after in zip(old, new, strict=True):
        if before is None or after is None:
            continue
        size, rank = before.shape
        overlap = (before.T @ after).square().sum() / rank
        values.append((overlap - rank / size) / (1 - rank / size) if rank < size else torch.ones_like(overlap))
    return torch.stack(values).min()
