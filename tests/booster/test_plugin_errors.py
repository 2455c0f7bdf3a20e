"""Every mistake is one clear error, the same on every rank, before anything is sent but names and numbers."""

from __future__ import annotations

import re

import error_cases
import pytest

from colossal_bcd.testing import run_ranks

MESSAGES = {
    "unmatched_prefix": r"ValueError: .*'model\.layers\.7\.' matches no parameter; closest names are",
    "overlapping_blocks": r"ValueError: .*model\.layers\.0\.mlp",
    "empty_block_list": r"ValueError: .*block_prefix_list",
    "unknown_switch_mode": r"ValueError: .*'sideways'.*random",
    "duplicated_parameters": r"ValueError: .*model\.embed_tokens\.weight",
    "no_optimizer": r"TypeError: boost: got an optimizer of type str, expected a torch\.optim\.Optimizer",
    "base_is_no_optimizer": r"TypeError: base_optimizer",
    "sparse_embedding": r"ValueError: module '0' has sparse gradients, expected dense ones",
    "sparse_adam": r"ValueError: boost: got torch's SparseAdam, which cannot step tensors by their gradients alone",
    "sparse_adam_under_ddp": r"ValueError: boost: got torch's SparseAdam, which cannot step tensors by their gradients",
    "overlap_allgather_with_tp": r"ValueError: overlap_allgather=True with tp_size=2",
    "fp8_communication": r"ValueError: fp8_communication=True is not supported",
    "unknown_plugin_argument": r"TypeError: .*'sage'",
    "ddp_static_graph": r"ValueError: TorchDDPPlugin\(static_graph=True\) with a BlockOptimizer",
    "whole_matrix_optimizer": r"ValueError: .*LBFGS.* whole matrices",
    "stepped_optimizer": r"ValueError: attach: the optimizer has taken 1 steps",
    "optimizer_of_another_model": r"ValueError: .*parameters of the model that is boosted",
    "never_bound": r"ValueError: Lamb: parameter 0 .*without a layout",
    "no_sync_at_stage_2": r"ValueError: no_sync: stage 2 keeps only a shard",
    "closure": r"ValueError: step\(closure\)",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_error_is_clear_and_the_same_on_every_rank(case: str) -> None:
    outcomes = run_ranks(2, error_cases.message_of, case)
    assert outcomes[0] == outcomes[1]
    message, collectives = outcomes[0]
    assert re.match(MESSAGES[case], message), message
    if case not in ("no_sync_at_stage_2", "closure", "stepped_optimizer"):  # boosting itself communicates
        # At most the one in which the ranks compare what they were given.
        assert collectives <= 1
