"""Every kind of table fails where an optimizer returns NaN.

Python's `max(0.0, nan)` is 0.0, and tables that folded errors by it passed whatever a rule returned.  Here the tables'
own tests run while every step of every optimizer leaves NaN in its last parameter and that one's state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import test_block_plugins
import test_canonical
import test_checkpoints
import test_conformance
import test_contract
import test_correction
import test_correction_plugins
import test_edges
import test_galore
import test_galore_plugins
import test_galore_rules
import test_install
import test_low_rank
import test_low_rank_gradients
import test_optim
import test_outside
import test_plugins
import test_quantized
import test_ratio
import test_ratio_plugins
import test_refresh
import test_relora
import test_relora_plugins
import test_replicas
import test_setup_distributed
import test_stacks
import test_thaw
import torch
from conformance_cases import Sizes, conform, train_by_reference, train_on_one_process
from support.spoiled import call_each, few, spoiled_steps

from colossal_bcd.testing import RankError, run_ranks

VARIANT = "came-decay"
FEW = {
    "canonical_cases.MAKE": ["galore-sgd"],
    "conformance_cases.TABLE": ["came"],
    "conformance_cases.VARIANTS": [VARIANT],
    "galore_rule_cases.RULES": ["sgd"],
    "setup_distributed_cases.OPTIMIZERS": ["lamb"],
    "test_quantized.OPTIMIZERS": ["AdamW"],
    "test_replicas.TABLE": list(test_replicas.TABLE)[:1],
    "test_outside.WRITTEN": {2: {"zero1-bf16": test_outside.WRITTEN[2]["zero1-bf16"]}},
    "test_outside.EDITED": {2: {"zero2": test_outside.EDITED[2]["zero2"]}},
}
"""Of large tables the rows that stay."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file that the conformance tests read."""
    path = tmp_path_factory.mktemp("nan") / "expected.pt"
    reference = train_by_reference(VARIANT)
    with spoiled_steps():
        ours = train_on_one_process(VARIANT)
    torch.save({VARIANT: {"reference": reference, "one process": ours}}, path)
    return str(path)


def conformance(path: str, against: str) -> None:
    reports = [json.loads(text) for text in test_conformance.run_ranks(2, conform, Sizes(1, 2), path)]
    getattr(test_conformance.TestMesh(), f"test_step_equals_{against}")((Sizes(1, 2), reports), VARIANT)


def canonical() -> None:
    test_canonical.test_state_of_every_mesh_is_that_of_one_process(
        Sizes(2, 1), {name: test_canonical.cases.alone(name) for name in FEW["canonical_cases.MAKE"]}
    )


ON_RANKS: dict[str, Callable[[str], None]] = {
    "conformance": lambda path: conformance(path, "the_reference"),
    "conformance to one process": lambda path: conformance(path, "one_process"),
    "edges": lambda _: test_edges.test_edges_equal_the_textbook_on_every_mesh([(2, 1)]),
    "8-bit moments": lambda _: test_quantized.test_moments_on_meshes_stay_within_the_bound_and_replicas_are_equal(
        Sizes(1, 2)
    ),
    "galore": lambda _: test_galore.test_galore_on_a_mesh_equals_one_process("std", Sizes(1, 2)),
    "galore rules": lambda _: test_galore_rules.test_galore_rule_on_a_mesh_equals_textbook_code(Sizes(1, 2)),
    "refreshes": lambda _: test_refresh.test_refresh_on_a_mesh_equals_a_plain_loop("staggered", Sizes(1, 2)),
    "low rank": lambda _: test_low_rank_gradients.test_low_rank_gradients_give_the_step_of_whole_gradients(
        Sizes(2, 1), True
    ),
    "state in files": lambda _: canonical(),
    "replicas": lambda _: test_replicas.test_replicas_equal_one_process(2),
    "plugins": lambda _: test_plugins.test_plugin_step_equals_textbook("zero2-2"),
    "plugins, tp": lambda _: test_plugins.test_plugin_step_equals_textbook("tp2-padded"),
    "blocks": lambda _: test_block_plugins.test_block_losses_are_bit_identical("zero2-2"),
    "blocks, sums": lambda _: test_block_plugins.test_block_losses_with_sgd_within_rounding("tp2"),
    "corrections": lambda _: test_correction_plugins.test_correction_losses_are_bit_identical("zero2-2"),
    "corrections, sums": lambda _: test_correction_plugins.test_correction_losses_within_rounding("tp2-galore"),
    "micro-batches": lambda _: test_correction_plugins.test_correction_of_fewer_micro_batches_than_declared(1),
    "galore, plugins": lambda _: test_galore_plugins.test_galore_plugin_step_equals_one_process("zero2-2"),
    "galore, 8 bits": lambda _: test_galore_plugins.test_galore_plugin_keeps_moments_in_8_bits("zero2-2"),
    "low rank, plugins": lambda _: test_low_rank.test_low_rank_training_is_exact_in_float64("zero1-2"),
    "ratio": lambda _: test_ratio_plugins.test_ratio_plugin_step_equals_one_process("zero1-2"),
    "ReLoRA": lambda _: test_relora_plugins.test_relora_ranks_equal_one_process("zero2", 2, "sgd"),
    "written weights": lambda _: test_outside.test_outside_written_weights_are_followed(2),
    "edited gradients": lambda _: test_outside.test_outside_edited_gradients_equal_one_process(2),
    "missed batches": lambda _: test_thaw.test_blocks_that_a_batch_misses_train_on_the_others("zero1"),
    # These change ColossalAI for what comes after them.
    "setup_distributed": lambda _: test_setup_distributed.test_setup_distributed_behind_zero_equals_textbook(
        test_setup_distributed.ZERO2, "ours"
    ),
    "install": lambda _: test_install.test_installed_stock_plugin_step_equals_textbook("zero1-2"),
}
"""By kind of table a test of it on two ranks."""


class WantedError(Exception):
    """Ends a test where it starts ranks."""


@pytest.fixture(scope="module")
def spoiled(expected: str) -> dict[str, list[tuple[Any, str]]]:
    """By kind of table what each rank returns: the functions that the tests start ranks for, all in one start."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def ask(num_ranks: int, function: Callable[..., Any], *arguments: Any, **_: Any) -> None:
        assert num_ranks == 2
        calls.append((function, arguments))
        raise WantedError

    for table in ON_RANKS.values():
        with pytest.MonkeyPatch.context() as patch, few(FEW):
            replace_run_ranks(patch, ask)
            with pytest.raises(WantedError):
                table(expected)
    ranks = run_ranks(2, call_each, calls, FEW)
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(ON_RANKS)}


def replace_run_ranks(patch: pytest.MonkeyPatch, by: Callable[..., Any]) -> None:
    for name, module in globals().items():
        if name.startswith("test_") and hasattr(module, "run_ranks"):
            patch.setattr(module, "run_ranks", by)
    patch.setattr(test_setup_distributed, "KEPT", {})


@pytest.mark.parametrize("name", ON_RANKS)
def test_table_on_ranks_fails_for_nan(
    name: str, spoiled: dict[str, list[tuple[Any, str]]], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(error for _, error in spoiled[name]), spoiled[name]
    if all(result is None for result, _ in spoiled[name]):
        return
    replace_run_ranks(monkeypatch, lambda *_, **__: [result for result, _ in spoiled[name]])
    with few(FEW), pytest.raises(AssertionError) as failure:
        ON_RANKS[name](expected)
    assert not isinstance(failure.value, RankError)


def stacks() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_stacks.test_stacks_give_the_numbers_of_one_at_a_time(patch, test_optim.AdamW, False)


def adamw_of_torch(devices: tuple[str, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_optim.test_adamw_equals_torch_to_the_last_bits(patch, 0.1, {}, devices)


ON_ONE_PROCESS: dict[str, Callable[[str], None]] = {
    "conformance": lambda path: test_conformance.test_one_process_equals_the_reference(path, VARIANT),
    "textbook": lambda _: test_edges.test_edges_equal_the_textbook_in_float32("lamb"),
    "torch": lambda _: adamw_of_torch(("cpu",)),
    "torch, without a fused kernel": lambda _: adamw_of_torch(()),
    "galore rules": lambda _: test_galore_rules.test_galore_rule_equals_textbook_code("adamw", "std"),
    "galore of the originals": lambda _: test_galore_rules.test_galore_adafactor_equals_the_original("std", None),
    "moments in 8 bits": lambda _: test_quantized.test_moment_follows_the_float32_one_within_the_bound(
        "AdamW", torch.float32
    ),
    "weights by 8 bits": lambda _: test_quantized.test_adamw_weights_follow_within_the_bound_of_their_moments(),
    "stacks": lambda _: stacks(),
    "base optimizers": lambda _: (
        test_contract.test_every_base_of_blocks_equals_a_new_optimizer_per_block_or_is_refused_by_name(
            "torch.optim.AdamW"
        )
    ),
    "corrections": lambda _: test_correction.test_correction_equals_loop_in_float64("sgd", "all"),
    "ratio": lambda _: test_ratio.test_ratio_equals_the_plain_rule("adjacent", True),
    "ReLoRA": lambda _: test_relora.test_relora_equals_the_plain_rule("adamw", 0),
}
"""By kind of table a test of it without ranks."""


@pytest.mark.parametrize("name", ON_ONE_PROCESS)
def test_table_on_one_process_fails_for_nan(name: str, expected: str) -> None:
    with spoiled_steps(), pytest.raises(AssertionError):
        ON_ONE_PROCESS[name](expected)


@pytest.mark.parametrize(("name", "key"), [("came", "w.master"), ("came-8bit", "w.exp_avg"), ("came", "w.row_total")])
def test_comparison_of_checkpoints_fails_for_nan(name: str, key: str) -> None:
    """Though the file has, bit for bit, what was loaded."""
    side = {key: torch.tensor([1.0, torch.nan])}, {"files": [], "entries": {}}
    with pytest.raises(AssertionError):
        test_checkpoints.compare(name, side, (side[0], {"files": [], "entries": {}}))
