"""The sign convention of projectors in textbook form, for references and for original packages, which have LAPACK's."""

import contextlib
from unittest import mock

import torch


def with_signs(vectors):
    """[n, q] with the first component of each column that is within 1 % of its largest made positive."""
    columns = []
    for column in vectors.T:
        largest = column.abs().max().item()
        leading = next(value for value in column.tolist() if abs(value) >= 0.99 * largest)
        columns.append(column if leading > 0 else -column)
    return torch.stack(columns, 1)


@contextlib.contextmanager
def signed_svd():
    """Singular vectors that are asked for inside have the signs of the convention, left and right ones apart."""
    original = torch.linalg.svd

    def svd(*args, **kwargs):
        u, s, vh = original(*args, **kwargs)
        return with_signs(u), s, with_signs(vh.T).T

    with mock.patch.object(torch.linalg, "svd", svd):
        yield
