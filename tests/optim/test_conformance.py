"""Every optimizer on every mesh computes what textbook code computes on the whole tensor, in float64."""

import functools
import json

import pytest
import torch
from conformance_cases import (
    CASES,
    MESHES,
    SHARDED_BY_TORCH,
    TABLE,
    TOLERANCE,
    VARIANTS,
    Case,
    Sizes,
    conform,
    gradient,
    hyper_of,
    initial,
    largest_errors,
    measure_all_waves,
    train_by_reference,
    train_on_one_process,
)

from colossal_bcd.optim.state.stack import COPIES
from colossal_bcd.testing import run_ranks


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """File of whole weights by reference and by one process."""
    weights = {
        variant: {"reference": train_by_reference(variant), "one process": train_on_one_process(variant)}
        for variant in VARIANTS
    }
    path = tmp_path_factory.mktemp("conformance") / "expected.pt"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module", params=[*MESHES, *SHARDED_BY_TORCH], ids=str)
def outcome(request, expected):
    """A mesh and what its ranks found."""
    sizes = request.param
    return sizes, [json.loads(text) for text in run_ranks(sizes.num_ranks, conform, sizes, str(expected))]


def failing(reports, variant, key):
    """The cases past the tolerance: {"rank 1: 64x48-dim0": error}."""
    return {
        f"rank {rank}: {case}": error
        for rank, report in enumerate(reports)
        for case, error in zip(CASES, report[variant][key], strict=True)
        if not error <= TOLERANCE
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_process_equals_the_reference(expected, variant):
    weights = torch.load(expected, mmap=True, weights_only=True)[variant]
    for case, reference, ours in zip(CASES, weights["reference"], weights["one process"], strict=True):
        assert (reference[-1] - ours).abs().max().item() <= TOLERANCE, str(case)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_moves_every_case_at_every_gradient(expected, variant):
    """Guards the table itself: a weight that stands still would hide an update that does nothing."""
    history = torch.load(expected, mmap=True, weights_only=True)[variant]["reference"]
    for index in range(len(CASES)):
        before = [initial(index), *history[index][:-1]]
        for step in (1, 2, 3):
            moved = not torch.equal(before[step], history[index][step])
            assert moved == (gradient(index, step) is not None), f"{CASES[index]} at step {step}"


@pytest.mark.parametrize("variant", VARIANTS)
class TestMesh:
    def test_step_equals_the_reference(self, outcome, variant):
        _, reports = outcome
        assert failing(reports, variant, "errors") == {}

    def test_step_equals_one_process(self, outcome, variant):
        _, reports = outcome
        assert failing(reports, variant, "errors_to_one_process") == {}

    def test_step_makes_its_rounds_of_collectives_per_axis(self, outcome, variant):
        sizes, reports = outcome
        row = hyper_of(variant)[0]
        calls = row.calls(sizes)
        for report in reports:
            assert report[variant]["calls"] == [[calls, calls]] * row.num_steps

    def test_waves_change_the_collectives_and_not_the_numbers(self, outcome, variant):
        sizes, reports = outcome
        assert failing(reports, variant, "wave_errors") == {}
        calls = hyper_of(variant)[0].calls(sizes)
        assert len({report[variant]["wave_calls"] for report in reports}) == 1
        assert all(
            report[variant]["wave_calls"] > 3 * calls if calls else report[variant]["wave_calls"] == 0
            for report in reports
        )

    def test_replicated_parameters_are_bitwise_equal_over_tp(self, outcome, variant):
        sizes, reports = outcome
        for rank, report in enumerate(reports):
            assert report[variant]["replicated"] == reports[rank // sizes.tp * sizes.tp][variant]["replicated"]

    def test_padding_is_not_changed(self, outcome, variant):
        _, reports = outcome
        assert all(report[variant]["padding_is_untouched"] for report in reports)


@pytest.mark.parametrize("row", TABLE)
class TestMeshAndRow:
    def test_padding_changes_no_bit_of_the_data(self, outcome, row):
        _, reports = outcome
        assert not any(report[row]["padding_counts"] for report in reports)

    def test_collectives_do_not_depend_on_the_number_of_tensors(self, outcome, row):
        sizes, reports = outcome
        calls = TABLE[row].calls_of_many(sizes)
        if sizes.zero > 2:
            assert "calls_of_many" not in reports[0][row]
            return
        assert all(report[row]["calls_of_many"] == [calls, calls] for report in reports)


def test_copies_of_slices_of_divided_tensors_equal_the_reference(expected):
    """Three dims of a device mesh, of which each has two ranks."""
    sizes, variants = Sizes(2, 2, replicas=2, dtensors=True), ["lamb-decay", "came-decay", "galore-adamw-decay"]
    for errors in run_ranks(sizes.num_ranks, largest_errors, sizes, str(expected), variants):
        assert {variant: error for variant, error in errors.items() if not error <= TOLERANCE} == {}


def test_meshes_hold_empty_ragged_and_all_padding_parts():
    """Guards the table itself: the hard layouts are among the cases."""
    layouts = [
        case.layout(sizes, t, z)
        for sizes in MESHES
        for case in CASES
        for t in range(sizes.tp)
        for z in range(sizes.zero)
    ]
    assert any(layout.num_local == 0 for layout in layouts)
    assert any(0 < layout.num_local < layout.max_local for layout in layouts)
    assert Case(shape=(10, 16), dim=0, padded=64).layout(Sizes(2, 1), 1, 0).num_local == 0


@functools.cache
def wave_peaks():
    return run_ranks(2, measure_all_waves)[0]


@pytest.mark.parametrize("optimizer", ["Lamb", "Adafactor", "CAME"])
@pytest.mark.parametrize("num_rules", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_wave_keeps_its_temporaries_within_the_budget_and_one_rule(optimizer, dtype, num_rules):
    """bf16 kept a float32 copy of each gradient alive between rounds and float64 was counted as float32: twice the
    budget."""
    peak, alone, rule = wave_peaks()[optimizer, dtype, num_rules]
    # Scalars of a round: two sums and their parts per rule, the packed buffer, the trust ratio's.
    # Of a factored rule also rows and columns: their sums, the packed buffer, its parts and the means.
    scalars = 12 * 16 * 8
    if optimizer != "Lamb":
        scalars += 12 * 4 * (64 + 64) * 8
    assert peak <= num_rules * rule + alone + scalars
    # A stack counts all its copies, of which not all are alive at once.
    assert peak >= num_rules * rule / COPIES
