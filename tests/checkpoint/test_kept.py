"""Checkpoints that an earlier version wrote: today's code loads them and goes on as that version did."""

from __future__ import annotations

import pytest
from kept_cases import WRITTEN, alone, expected, resume_each, written_by_such_kernels

from colossal_bcd.testing import run_ranks

BOUND = 0.03
"""Of losses of 5 that bfloat16 activations, 2^-8 apart, have on another mesh or another machine."""


def names_of(source: str) -> list[str]:
    return [name for name, meshes in WRITTEN.items() if source in meshes]


@pytest.mark.parametrize("name", names_of("alone"))
def test_kept_state_dict_goes_on_as_before(name: str) -> None:
    (before,), after = expected(name, "alone"), alone(name)
    if written_by_such_kernels():
        assert after == before
    assert after["losses"] == pytest.approx(before["losses"], abs=BOUND)


@pytest.mark.parametrize(
    ("source", "mesh", "num_ranks"),
    [("zero2", "zero2", 2), ("tp2", "tp2", 2), ("zero2", "zero2", 1), ("zero2", "tp2", 2), ("tp2", "zero2", 2)],
)
def test_kept_checkpoint_goes_on_as_before(source: str, mesh: str, num_ranks: int) -> None:
    """Bit for bit where the mesh is the one that wrote it."""
    ranks = run_ranks(num_ranks, resume_each, names_of(source), mesh, source)
    alike = (mesh, num_ranks) == (source, 2) and written_by_such_kernels()
    for name in names_of(source):
        after, before = [rank[name] for rank in ranks], expected(name, source)
        if alike:
            # At the last step GaLore's momentum meets new bases, which have the signs of a convention now.
            count = 2 if name == "by_galore" else 3
            assert [rank["weights"][:count] for rank in after] == [rank["weights"][:count] for rank in before], name
            assert [rank["losses"] for rank in after] == [rank["losses"] for rank in before], name
        for rank in after:
            assert rank["losses"] == pytest.approx(before[0]["losses"], abs=BOUND), name
