"""What runs in `make test-full` only: cases of a test whose claim other cases keep in `make test`; and what runs first.

Each kind of mesh (one rank, ZeRO with and without a remainder, tensor parallelism, both, pipelines, DDP) and each rule
stays in the quick suite at least once; what is named here repeats a claim on one more mesh of the same kind, or a rule
on one more mesh.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

FULL: dict[str, tuple[str, ...]] = {
    # Each host with one optimizer is "sample"; these are all cells of the page.
    "benchmarks/test_compatibility.py::test_cells_are_what_runs_show": ("[0-7]",),
    # Every mesh and every kind of optimizer stays.
    "cli/test_estimates.py::test_bytes_and_traffic_are_what_ranks_measure": (
        "*, golore*",
        "*, adamw-8bit",
        "*, lion",
        "*, sgd",
        "zero2, adamw",
        "tp2, adamw",
        "one rank, [cl]a*",
        "one rank, galore?*",
        "one rank, adafactor",
        "zero1, [abcg]*",
        "zero1, lora",
        "tp2, [bcgl]*",
        "fsdp2, galore*",
        "fsdp2, [acl]*",
        "zero2, galore-8bit",
        "zero2, galoread*w*",
        "zero2, galore[ls]*",
        "zero2, lamb",
    ),
    # Ragged slices are tp1-zero3 and fsdp3, divided matrices tp2-zero1, both tp2-zero2 and tp2-fsdp2.
    "optim/test_conformance.py::TestMesh": ("tp1-zero[124]-*", "tp2-zero[34]-*", "fsdp[24]-*"),
    "optim/test_conformance.py::TestMeshAndRow": ("tp1-zero[124]-*", "tp2-zero[34]-*", "fsdp[24]-*"),
    "optim/test_adafactor.py::test_adafactor_and_came_equal_the_originals_on_meshes": ("tp2-zero1", "tp1-zero2"),
    "optim/test_quantized.py::test_moments_on_meshes_stay_within_the_bound_and_replicas_are_equal": ("tp1-zero3",),
    "optim/test_rounding.py::test_meshes_and_replicas_draw_the_same_bits": ("tp2-zero1", "tp1-zero3"),
    "optim/test_edges.py::test_edges_equal_the_textbook_on_every_mesh": ("tp2 and zero2",),
    "optim/test_bitsandbytes.py::test_every_optimizer_equals_itself_on_one_process_or_is_refused_by_name": (
        "tensor-parallel",
    ),
    "optim/test_bitsandbytes.py::test_every_optimizer_goes_on_on_another_mesh_as_on_one_process": ("1",),
    "optim/test_state_kinds.py::test_state_of_every_kind_comes_back_on_another_mesh": ("1",),
    "sharding/test_canonical.py::test_state_of_every_mesh_is_that_of_one_process": ("tp1-zero1", "tp2-zero1"),
    "low_rank/test_galore_rules.py::test_galore_rule_on_a_mesh_equals_textbook_code": ("tp1-zero3",),
    "low_rank/test_low_rank_gradients.py::test_low_rank_gradients_give_the_step_of_whole_gradients": (
        "partitioned-tp1-zero1",
        "partitioned-tp2-zero1",
        "whole-tp1-zero1",
        "whole-tp1-zero3",
    ),
    "low_rank/test_refresh.py::test_refresh_on_a_mesh_equals_a_plain_loop": (
        "staggered-tp1-zero2",
        "staggered-tp1-zero3",
        "lazy-tp1-zero2",
        "lazy-tp2-zero1",
        "staggered-reprojected-tp1-zero2",
        "staggered-reprojected-tp2-zero1",
        "staggered-reprojected-tp2-zero2",
        "lazy-reprojected-tp1-zero2",
        "lazy-reprojected-tp1-zero3",
        "lazy-reprojected-tp2-zero1",
    ),
    "low_rank/test_galore.py::test_galore_on_a_mesh_equals_one_process": ("*-tp1-zero2", "*-tp2-zero1"),
    "fsdp/test_fsdp_blocks.py::test_blocks_on_copies_shards_and_tensor_parallel_ranks_are_one_process_in_float64": (
        "bread momentum",
    ),
    "fsdp/test_fsdp_checkpoints.py::test_a_run_of_three_ranks_goes_on_on_other_meshes": ("*-8-hsdp_tp2",),
    "engine/test_engine.py::test_engine_bytes_equal_the_formula": ("1-1", "1-2", "2-1", "2-3"),
    "engine/test_faults.py::test_survivors_of_a_killed_rank_name_the_round_and_the_run_goes_on": ("rule", "gather"),
    "engine/test_replicas.py::test_replicas_equal_one_process": ("3",),
    "booster/test_plugins.py::test_plugin_step_equals_textbook": (
        "zero1-1",
        "zero1-2",
        "zero1-3",
        "zero2-1",
        "zero2-4",
        "zero1-extra-dp-4",
        "tp2",
        "tp2-zero1-dp1",
        "tp4",
        "tp2-zero1-dp2",
    ),
    "booster/test_block_plugins.py::test_block_losses_are_bit_identical": (
        "zero1-2",
        "zero1-2-no-overlap",
        "zero2-1",
        "zero2-4-same-batch",
        "hybrid-zero1-2",
    ),
    "booster/test_block_plugins.py::test_block_losses_with_sgd_within_rounding": ("tp2", "tp2-zero1", "tp4"),
    "booster/test_correction_plugins.py::test_correction_losses_are_bit_identical": (
        "zero1-1",
        "zero1-2",
        "zero2-2",
        "zero1-2-no-overlap",
        "zero2-4-same-batch",
    ),
    "booster/test_correction_plugins.py::test_correction_losses_within_rounding": (
        "tp2",
        "zero2-4",
        "zero1-1-galore",
        "tp2-galore",
    ),
    "booster/test_correction_plugins.py::test_correction_under_pipelines_makes_one_update_a_step": ("pp2",),
    "booster/test_galore_plugins.py::test_galore_plugin_step_equals_one_process": ("zero2-2", "tp2"),
    "booster/test_galore_plugins.py::test_galore_plugin_step_of_other_rules_equals_one_process": (
        "zero2-2-sgd",
        "tp2-adafactor",
        "tp2-zero2-sgd",
    ),
    "booster/test_galore_plugins.py::test_galore_plugin_keeps_moments_in_8_bits": ("zero2-2",),
    "booster/test_galore_plugins.py::test_galore_plugin_replicas_stay_equal_with_singular_vectors": ("zero2-2",),
    "booster/test_install.py::test_installed_stock_plugin_step_equals_textbook": (
        "zero1-1",
        "zero1-2",
        "zero2-3",
        "tp2-zero1-dp2",
        "tp2-zero2-dp1",
        "tp2-adafactor",
        "zero2-2-came",
        "zero2-3-galore",
    ),
    "booster/test_low_rank.py::test_low_rank_training_is_exact_in_float64": ("one rank", "zero1-2, no overlap"),
    "booster/test_low_rank.py::test_low_rank_bytes_of_reduction": ("1-2", "2-3"),
    "booster/test_low_rank.py::test_low_rank_replicas_stay_equal": ("tp2-zero1",),
    "booster/test_pipeline.py::test_pipeline_every_stage_trains_a_block_of_its_own": ("pp2-zero0", "pp2-zero1-dp2"),
    "booster/test_ratio_plugins.py::test_ratio_plugin_step_equals_one_process": ("zero1-2", "tp2", "tp2-zero2-scatter"),
    "booster/test_ratio_plugins.py::test_ratio_plugin_run_equals_one_process": (
        "2-zero-options0-False-1",
        "2-ddp-options3-False-2",
    ),
    "booster/test_relora_plugins.py::test_relora_ranks_equal_one_process": ("zero1-2-adamw", "zero2-2-sgd"),
    "booster/test_setup_distributed.py::test_setup_distributed_behind_zero_equals_textbook": (
        "ours-zero2",
        "stock-zero2",
    ),
    "booster/test_thaw.py::test_thaw_numbers_are_those_of_one_process": ("zero1-no-overlap", "hybrid1"),
    "booster/test_thaw.py::test_thaw_on_meshes": ("tp2-thaw", "tp2-group", "pp2-group", "tp2-zero2-thaw"),
    "checkpoint/test_checkpoints.py::test_a_run_goes_on_from_any_mesh_on_any_mesh": (
        "tp2+zero2 x4 to tp2+zero2 x4, 5 optimizers",
    ),
    "compat/test_seeds.py::test_badam_code_runs_under_zero": ("bread-badam", "badam-ascending", "badam-matrices"),
    "examples/test_example.py::test_two_ranks_give_the_losses_of_one_process": (
        "badam-zero2",
        "adafactor-zero2",
        "lamb-zero2",
        "golore-zero2",
        "galore-sgd-zero2",
        "galore-adafactor-zero2",
    ),
}
"""By test, or by class of tests, below this folder: patterns of the ids of its cases that wait, as of `fnmatch`."""

LONG = (
    "checkpoint/test_checkpoints.py",
    "booster/test_correction_plugins.py",
    "booster/test_plugins.py",
    "booster/test_outside.py",
    "booster/test_thaw.py",
    "optim/test_conformance.py",
    "optim/test_bitsandbytes.py",
    "booster/test_block_plugins.py",
    "block/test_graph_compile.py",
    "checkpoint/test_checkpoint_errors.py",
    "checkpoint/test_checkpoint_launched.py",
    "examples/test_golore_example.py",
    "examples/test_tutorial.py",
    "examples/test_example.py",
    "examples/test_short_programs.py",
    "booster/test_galore_plugins.py",
    "booster/test_graph_plugins.py",
    "engine/test_faults.py",
    "engine/test_replicas.py",
    "test_types.py",
    "test_nan.py",
)
"""The files that take longest, which begin first."""


def waits(nodeid: str) -> tuple[str, str] | None:
    """The key and the pattern in `FULL` that keep a test out of the quick suite; None: it is in it."""
    path, _, rest = nodeid.removeprefix("tests/").partition("::")
    name, _, case = rest.partition("[")
    for key in (f"{path}::{name}", f"{path}::{name.partition('::')[0]}"):
        for pattern in FULL.get(key, ()):
            if fnmatchcase(case.removesuffix("]"), pattern):
                return key, pattern
    return None
