"""Under the plugins checkpointed and compiled models train as those that are neither, to the bit, on every rank."""

from __future__ import annotations

import graph_plugin_cases
from graph_cases import LAYERS, PERIOD

from colossal_bcd.testing import run_ranks

STEPS = PERIOD * (LAYERS + 1)

CHECKPOINTED = [
    ("zero2", "ratio", "reentrant", ""),
    ("zero2", "ratio", "hf_before", ""),
    ("zero1", "block_head", "reentrant", ""),
    ("zero2", "lora_all", "nested", ""),
    ("hybrid", "block", "hf_after", ""),
    ("hybrid", "ratio", "hf_after", ""),
    ("ddp", "block", "wrapper", ""),
]
COMPILED = [
    ("zero2", "block", "none", "before"),
    ("zero1", "block_head", "none", "after"),
    ("ddp", "block", "none", "in_place"),
]


def test_plugins_train_checkpointed_and_compiled_models_the_same() -> None:
    """One start of ranks for all; compiled ones have one graph for each block."""
    runs = [*CHECKPOINTED, *COMPILED]
    for result in run_ranks(2, graph_plugin_cases.equal, runs, STEPS):
        for run in runs:
            same, num_graphs = result["-".join(run)]
            assert same, run
            assert num_graphs == (LAYERS if run in COMPILED else 0), run


def test_compiled_model_trains_a_thawed_layer_from_the_next_pass_on() -> None:
    """The pass that is under way when the layer is found has no gradient of it: its graph was compiled before."""
    assert run_ranks(2, graph_plugin_cases.thawed_compiled) == [(True, False)] * 2
