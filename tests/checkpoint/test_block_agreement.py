"""Ranks that would go on at different steps are told when they load, before their collectives no longer meet."""

import re

import agreement_cases as cases

from colossal_bcd.testing import run_ranks


def test_ranks_that_find_different_checkpoints_raise_the_same_error(tmp_path):
    """On a file system that is not shared, or late; a rank that switched blocks earlier would wait for the others."""
    errors = run_ranks(2, cases.different_checkpoints, str(tmp_path))
    assert errors[0] == errors[1]
    remedy = "as on rank 0. Load from a file system that all ranks share."
    assert errors[0][:2] == [
        f"CheckpointFolder: got that of step 1 on rank 1, expected that of step 2 {remedy}",
        f"CheckpointFolder: got no checkpoint on rank 1, expected that of step 2 {remedy}",
    ]
    one = r"one after {} steps \(manifest [0-9a-f]{{16}}\)"
    pattern = f"checkpoint: got {one.format(1)} on rank 1, expected {one.format(2)} {re.escape(remedy)}"
    assert re.fullmatch(pattern, errors[0][2])
