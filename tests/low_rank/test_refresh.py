"""Refreshes of bases: staggered, lazy, their plan and their reports, the same on every rank and mesh."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import galore_plugin_cases
import pytest
import refresh_cases
import torch
from conformance_cases import Sizes
from hypothesis import given
from hypothesis import strategies as st
from refresh_cases import CASES, RANK, STABLE, STEPS
from support.errors import largest_error
from test_galore_plugins import CASES as CASES_OF_PLUGINS
from torch import Tensor, nn

from colossal_bcd import GaLoreAdamW, GoLoreAdamW
from colossal_bcd.low_rank.projector import random_bases, similarity
from colossal_bcd.low_rank.refresh_schedule import Matrix, offsets, owners
from colossal_bcd.sharding import Layout, Mesh
from colossal_bcd.testing import run_ranks

MESHES = [Sizes(1, 2), Sizes(1, 3), Sizes(2, 1), Sizes(2, 2)]
MATRICES = [index for index, case in enumerate(CASES) if len(case.shape) > 1]
STAGGERED: dict[str, Any] = {"update_proj_gap": 4, "stagger": 2}
LAZY: dict[str, Any] = {"update_proj_gap": 2, "lazy_threshold": 0.4, "lazy_patience": 2}
VARIANTS = {
    "staggered": STAGGERED,
    "lazy": LAZY,
    "staggered-reprojected": {**STAGGERED, "reproject_momentum": True},
    "lazy-reprojected": {**LAZY, "reproject_momentum": True},
}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_refresh_on_a_mesh_equals_a_plain_loop(variant: str, sizes: Sizes) -> None:
    """Weights, energies and the steps of refreshes; bases are the same bits on all ranks."""
    reports = run_ranks(sizes.tp * sizes.zero, refresh_cases.errors, sizes, VARIANTS[variant])
    for report in reports:
        assert report["error"] <= 1e-12
        assert report["changed"] == report["due"] == report["plain"]["done"]
        for index in MATRICES:
            assert torch.equal(report["bases"][index], reports[0]["bases"][index]), "ranks hold different bases"
            assert report["energy"][-1][index] == pytest.approx(report["plain"]["energy"][index], rel=1e-12)
        assert report["energy"] == reports[0]["energy"]


@pytest.mark.parametrize("sizes", [Sizes(1, 1), Sizes(2, 2)], ids=str)
def test_refresh_staggered_by_load(sizes: Sizes) -> None:
    """Costs 2 R C min(R, C) by hand: 19200, 11760, 3234, 24576, 4608; two steps of four: {3, 4, 2} and {0, 1}."""
    report = run_ranks(sizes.tp * sizes.zero, refresh_cases.sharded, sizes, STAGGERED)[0]
    for step, due in enumerate(report["due"]):
        expected = {0: [2, 4, 5], 2: [0, 1]}.get(step % 4, [])
        assert due == (expected if step else MATRICES)


def test_refresh_lazily_by_hand() -> None:
    """Gap 2: stable at 2 and 4, so the next is at 8; at 12 the subspace has turned, and the gap is 2 again."""
    report = run_ranks(1, refresh_cases.sharded, Sizes(1, 1), LAZY)[0]
    assert [step for step in range(STEPS) if STABLE in report["changed"][step]] == [0, 2, 4, 8, 12, 14, 16]
    assert all(0 in report["changed"][step] for step in range(0, STEPS, 2))


@pytest.mark.parametrize("nan_at", [0, 4])
def test_refresh_decisions_agree_where_a_gradient_is_no_number(nan_at: int) -> None:
    """The owner alone sees it; its report, like its bases, reaches all: nobody waits for a collective that others skip.

    Bases stay, which is no sign of a stable subspace.
    """
    reports = run_ranks(4, refresh_cases.sharded, Sizes(2, 2), LAZY, nan_at)
    for report in reports:
        for what in ("due", "changed", "calls", "counters"):
            assert report[what] == reports[0][what]
        assert math.isnan(report["energy"][nan_at][STABLE])
        assert report["counters"][nan_at][STABLE]["refresh_stable"] == 0
        assert report["counters"][nan_at][STABLE]["refresh_at"] == nan_at // 2 + 1
        assert report["changed"][nan_at] == [i for i in report["due"][nan_at] if nan_at == 0 or i != STABLE]


def test_refresh_waits_for_the_device_once_and_only_if_lazy() -> None:
    """The owners' checks of whole gradients aside, of which each comes before a decomposition, which waits, too.

    A matrix that tensor parallelism does not divide has an owner among each of its replicas.
    """
    lazy = run_ranks(4, refresh_cases.sharded, Sizes(2, 2), LAZY)
    plain = run_ranks(4, refresh_cases.sharded, Sizes(2, 2), STAGGERED)
    for report, expected in [*((report, 1) for report in lazy), *((report, 0) for report in plain)]:
        for due, waits in zip(report["due"], report["waits"], strict=True):
            assert waits.count("tolist") == (expected if due else 0)
            assert set(waits) <= {"tolist", "__bool__"}
            assert waits.count("__bool__") <= len(due)
    for step, due in enumerate(lazy[0]["due"]):
        replicas = sum(2 if CASES[index].dim is None else 1 for index in due)
        assert sum(report["waits"][step].count("__bool__") for report in lazy) == replicas


def test_refresh_reports_travel_with_the_bases() -> None:
    """As many collectives as without: the exchange, and one more per axis than between refreshes.

    Where only some matrices are refreshed, the others are two rounds ahead of them: four rounds in all.
    """
    for hyper in (STAGGERED, LAZY):
        report = run_ranks(4, refresh_cases.sharded, Sizes(2, 2), hyper)[0]
        between = report["calls"][1]
        assert set(between) == {"all_reduce"}
        for due, calls in zip(report["due"], report["calls"], strict=True):
            axes = {axis for index in due for axis in CASES[index].layout(Sizes(2, 2), 0, 0).axes}
            assert calls.get("all_to_all_single", 0) == len(axes)
            if due in ([], MATRICES):
                assert calls["all_reduce"] == between["all_reduce"] + len(axes)
            else:
                assert calls["all_reduce"] <= between["all_reduce"] + 2 * 2


def test_refresh_random_bases_come_at_every_gap_and_report_the_mean() -> None:
    """GoLore under lazy and staggered refreshes: from its step on nothing is skipped, and nothing is sent."""
    hyper = {**LAZY, "stagger": 2, "random_from_step": 9, "reproject_momentum": True}
    reports = run_ranks(4, refresh_cases.sharded, Sizes(2, 2), hyper)
    for report in reports:
        for step in range(9, STEPS):
            assert "all_to_all_single" not in report["calls"][step]
            assert report["due"][step] == report["changed"][step]
        for step in (10, 11, 12, 13):
            assert sorted(report["due"][step] + report["due"][step + 1]) == MATRICES
        for index in MATRICES:
            assert torch.equal(report["bases"][index], reports[0]["bases"][index])
            rows, columns = CASES[index].shape[0], math.prod(CASES[index].shape[1:])
            assert report["energy"][-1][index] == pytest.approx(RANK / min(rows, columns), rel=1e-12)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30),
    st.integers(1, 20),
    st.data(),
)
def test_refresh_plan_is_balanced_and_independent_of_what_is_held(
    shapes: list[tuple[int, int]], gap: int, data: Any
) -> None:
    """No step has more to do than an even share and one matrix; a stage plans as one process does."""
    stagger = data.draw(st.integers(1, gap))
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = GaLoreAdamW([{"params": params, "rank": 1, "update_proj_gap": gap, "stagger": stagger}])
    alone = offsets_of(optimizer, range(len(params)))
    costs = [2 * math.prod(shape) * min(shape) for shape in shapes]
    loads = dict.fromkeys(range(gap), 0)
    for offset, cost in zip(alone, costs, strict=True):
        loads[offset] += cost
    used = min(stagger, len(shapes))
    assert len(set(alone)) <= used
    assert max(loads.values()) <= sum(costs) / used + max(costs)
    kept = [i for i in range(len(params)) if data.draw(st.booleans())]
    flat = {nn.Parameter(torch.zeros(math.prod(shapes[i]))): i for i in kept}
    optimizer.param_groups[0]["params"] = list(flat)
    layouts = {param: Layout.whole(shapes[i]).sliced("zero", 0, 1) for param, i in flat.items()}
    optimizer.bind(layouts, Mesh({"zero": ()}), flat)
    assert offsets_of(optimizer, kept) == [alone[i] for i in kept]


def offsets_of(optimizer: GaLoreAdamW, keys: Iterable[int]) -> list[int]:
    return [optimizer.turn(key).offset for key in keys]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30), st.integers(1, 4))
def test_refresh_owners_are_balanced_in_every_step(shapes: list[tuple[int, int]], ranks: int) -> None:
    matrices = {
        key: Matrix.of(key, shape, GaLoreAdamW.hyper_type(rank=1, gap=6, stagger=3)) for key, shape in enumerate(shapes)
    }
    layouts = {key: Layout.whole(shape).sliced("zero", 0, ranks) for key, shape in enumerate(shapes)}
    offset = offsets(matrices.values())
    owner = owners(matrices, layouts, offset)
    for step in set(offset.values()):
        costs = {key: matrix.cost for key, matrix in matrices.items() if offset[key] == step}
        loads = [sum(cost for key, cost in costs.items() if owner[key] == rank) for rank in range(ranks)]
        assert max(loads) <= sum(loads) / ranks + max(costs.values())


def test_refresh_owners_are_balanced_in_the_first_step() -> None:
    """Three equal matrices in each of three steps, two ranks: whoever has two of a step has one of the next."""
    matrices = {key: Matrix(key, 5, 6, 3) for key in range(9)}
    layouts = {key: Layout.whole((2, 2)).sliced("zero", 0, 2) for key in matrices}
    offset = offsets(matrices.values())
    assert offset == {key: [0, 4, 2][key % 3] for key in matrices}
    owner = list(owners(matrices, layouts, offset).values())
    assert sorted(owner.count(rank) for rank in range(2)) == [4, 5]


def trained(steps: range, optimizer: GaLoreAdamW, params: list[nn.Parameter]) -> None:
    for step in steps:
        for index, param in zip(MATRICES, params, strict=True):
            param.grad = refresh_cases.gradient(index, step)
        optimizer.step()


def matrices_of(hyper: dict[str, Any]) -> tuple[list[nn.Parameter], GaLoreAdamW]:
    params = [nn.Parameter(refresh_cases.weight(index)) for index in MATRICES]
    return params, GaLoreAdamW(params, lr=1e-2, rank=RANK, **hyper)


@pytest.mark.parametrize("hyper", [STAGGERED, LAZY], ids=["staggered", "lazy"])
def test_refresh_goes_on_from_a_checkpoint(hyper: dict[str, Any]) -> None:
    """Counters are plain numbers in the state."""
    params, optimizer = matrices_of(hyper)
    trained(range(7), optimizer, params)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in params]
    numbers = [{k: v for k, v in state.items() if not isinstance(v, Tensor)} for state in saved["state"].values()]
    assert all(type(value) is int for state in numbers for value in state.values())
    trained(range(7, STEPS), optimizer, params)
    again, resumed = matrices_of({})
    with torch.no_grad():
        for param, weight in zip(again, weights, strict=True):
            param.copy_(weight)
    resumed.load_state_dict(saved)
    trained(range(7, STEPS), resumed, again)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_refresh_becomes_lazy_in_the_middle() -> None:
    """State from before has none of the integers: engines may ask, and the next step refreshes as it would have."""
    params, optimizer = matrices_of({"update_proj_gap": 2})
    trained(range(3), optimizer, params)
    optimizer.param_groups[0].update(lazy_threshold=0.4, lazy_patience=1)
    steady = params[MATRICES.index(STABLE)]
    seen = []
    for step in range(3, 9):
        due = steady not in optimizer.low_rank_wanted()
        trained(range(step, step + 1), optimizer, params)
        seen.append((step, due, optimizer.state[steady]["refresh_at"]))
    # Stable at 4: the gap is 4 steps; at 8 again: 8 steps.
    assert seen == [(3, False, 0), (4, True, 4), (5, False, 4), (6, False, 4), (7, False, 4), (8, True, 8)]


def test_refresh_survives_a_copy() -> None:
    params, optimizer = matrices_of(STAGGERED)
    trained(range(3), optimizer, params)
    twin = copy.deepcopy(optimizer)
    trained(range(3, 6), optimizer, params)
    trained(range(3, 6), twin, twin.param_groups[0]["params"])
    assert all(torch.equal(a, b) for a, b in zip(params, twin.param_groups[0]["params"], strict=True))


def test_refresh_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    params, optimizer = matrices_of(STAGGERED)
    with caplog.at_level(logging.INFO, logger="colossal_bcd"):
        trained(range(5), optimizer, params)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == [f"bases of {n} of 5 matrices refreshed" for n in (5, 2, 3)]
    values = [optimizer.captured_energy()[params[MATRICES.index(index)]] for index in (2, 4, 5)]
    low, middle, high = sorted(values)
    assert lines[-1].endswith(f"captured energy {middle:.3f} ({low:.3f} to {high:.3f})")


def test_refresh_logs_what_it_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    params, optimizer = matrices_of({})
    with caplog.at_level(logging.INFO, logger="colossal_bcd"):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert caplog.messages == [
        "bases of 5 of 5 matrices refreshed, captured energy unknown; 5 gradients zero or not finite"
    ]


def test_refresh_of_blocks_equals_one_process() -> None:
    """State is cleared at a switch: the first step of a block refreshes all of it, whatever the plan says."""
    options = {"update_proj_gap": 4, "stagger": 2, "svd_method": "random"}
    alone = run_ranks(1, galore_plugin_cases.inside_blocks, 1, options)[0]
    for losses in run_ranks(2, galore_plugin_cases.inside_blocks, 2, options):
        assert largest_error(losses, alone) <= 1e-4


@pytest.mark.parametrize("case", ["zero2-2", "tp2-zero2"])
def test_refresh_staggered_under_a_plugin_equals_one_process(case: str) -> None:
    """The engine reduces images of the layers that are not refreshed, and whole gradients of those that are."""
    num_ranks, plugin, options = CASES_OF_PLUGINS[case]
    hyper = {"svd_method": "random", "stagger": 3}
    bound = 20 * 2**-24 * (4 + 64 * 0.02 * 96**0.5)  # see test_galore_plugins.py
    for report in run_ranks(num_ranks, galore_plugin_cases.injected, plugin, options, hyper):
        assert report["error"] <= bound
        assert report["replicas"]


def test_refresh_lazily_under_a_plugin_keeps_replicas_equal() -> None:
    num_ranks, plugin, options = CASES_OF_PLUGINS["tp2-zero2"]
    hyper = {"update_proj_gap": 2, "stagger": 2, "lazy_threshold": 0.01, "lazy_patience": 1}
    reports = run_ranks(num_ranks, galore_plugin_cases.injected, plugin, options, hyper)
    assert all(report["replicas"] for report in reports)


def test_refresh_options_of_the_docs_are_accepted() -> None:
    text = (Path(__file__).parents[2] / "docs" / "refreshes.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"matrices": [nn.Parameter(torch.ones(256, 128))], "others": [nn.Parameter(torch.ones(4))]}
    exec(block, names)
    assert names["optimizer"].param_groups[0]["lazy_threshold"] == 0.4
    options = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert len(options) == 5
    assert options <= names["optimizer"].param_groups[0].keys()


def test_similarity_counts_subspaces_only() -> None:
    like = torch.empty(0, dtype=torch.float64)
    draws = [random_bases((40, 30), 8, "left", seed, like)[0] for seed in range(400)]
    bases = [draw for draw in draws if draw is not None]
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert similarity((bases[0], None), (bases[0] @ turn, None)).item() == pytest.approx(1)
    alike = torch.stack([similarity((a, None), (b, None)) for a, b in zip(bases[::2], bases[1::2], strict=True)])
    assert alike.mean().abs() <= 4 * alike.std() / len(alike) ** 0.5
    half = torch.cat([bases[0][:, :4], torch.linalg.qr(bases[0], mode="complete").Q[:, 8:12]], 1)
    assert similarity((bases[0], None), (half, None)).item() == pytest.approx((0.5 - 0.2) / 0.8)
    whole = torch.eye(8, dtype=torch.float64)
    assert similarity((bases[0], whole), (half, whole)).item() == pytest.approx((0.5 - 0.2) / 0.8)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"stagger": 0}, "stagger: got 0, expected a number of steps from 1 to update_proj_gap=200"),
        ({"stagger": 201}, "stagger: got 201"),
        ({"stagger": True}, "stagger: got True"),
        ({"lazy_threshold": 0.0}, "lazy_threshold: got 0.0, expected None or a number in \\(0, 1\\]"),
        ({"lazy_threshold": float("nan")}, "lazy_threshold"),
        ({"lazy_threshold": 0.4, "lazy_patience": 0}, "lazy_patience"),
        ({"lazy_threshold": 0.4, "svd_method": "random"}, "nothing in common"),
    ],
)
def test_refresh_refuses_what_it_cannot_do(hyper: dict[str, Any], message: str) -> None:
    for make in (GaLoreAdamW, lambda params, **options: GoLoreAdamW(params, total_steps=10, **options)):
        with pytest.raises(ValueError, match=message):
            make([nn.Parameter(torch.ones(8, 12))], rank=2, **hyper)
