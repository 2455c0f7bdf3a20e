"""Layouts of DTensors equal what torch stores."""

import functools

import pytest
import torch
from support.dtensor_cases import equal_ranks_are_one_axis, layouts_of_models, layouts_of_placements

from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.dtensor import MeshAxes, is_dtensor, layout_of, local_values
from colossal_bcd.testing import run_ranks

HOWS = {2: ("fsdp", "tp", "hsdp"), 3: ("fsdp",), 4: ("fsdp", "hsdp", "tp-fsdp", "tp-hsdp")}


@functools.cache
def models(num_ranks):
    return run_ranks(num_ranks, layouts_of_models, HOWS[num_ranks])


@functools.cache
def placements():
    return run_ranks(4, layouts_of_placements)


@pytest.mark.parametrize(("num_ranks", "how"), [(ranks, how) for ranks, hows in HOWS.items() for how in hows])
def test_layouts_are_what_fully_shard_and_parallelize_module_store(num_ranks, how):
    for report in models(num_ranks):
        problems, layouts, _ = report[how]
        assert {name: found for name, found in problems.items() if found} == {}
        assert len(layouts) == 9


def test_models_have_ragged_and_empty_slices():
    """Guards the cases themselves."""
    layouts = [layout for report in models(3) for layout in report["fsdp"][1].values()]
    assert any(layout.num_local == 0 for layout in layouts)
    assert any(0 < layout.num_local < layout.max_local for layout in layouts)


def test_axes_are_the_groups_that_divide_and_replicas_are_none():
    sizes = {(ranks, how): models(ranks)[0][how][2] for ranks, hows in HOWS.items() for how in hows}
    assert sizes == {
        (2, "fsdp"): {"zero": 2},
        (2, "tp"): {"zero": 2},
        (2, "hsdp"): {},
        (3, "fsdp"): {"zero": 3},
        (4, "fsdp"): {"zero": 4},
        (4, "hsdp"): {"zero": 2},
        (4, "tp-fsdp"): {"zero": 2, "tp": 2},
        (4, "tp-hsdp"): {"zero": 2},
    }


def test_colwise_weights_are_split_and_sliced_by_rows():
    layout = models(4)[3]["tp-fsdp"][1]["up.weight"]
    assert (layout.split.dim, layout.split.axis, layout.slice.axis) == (0, "tp", "zero")


@pytest.mark.parametrize(
    "case",
    [
        "scalar",
        "columns",
        "middle",
        "rows twice",
        "rows, columns",
        "columns, rows",
        "replicas",
        "no rows",
        "fewer rows than ranks",
        "whole",
    ],
)
def test_layouts_are_what_distribute_tensor_stores(case):
    assert [found[case] for found, _ in placements()] == [[]] * 4


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("uneven columns", r"divides 7 along dim 1 by 4 ranks, expected a multiple.*Pad the dim"),
        ("uneven rows, rows", r"divides 5 along dim 0 by 2 ranks, expected a multiple"),
        ("columns twice", r"in another way than one dim and then rows.*leave the parameter whole"),
        ("neither is rows", r"in another way than one dim and then rows"),
        ("descending", r"ranks \[3, 2, 1, 0\], expected ascending.*init_device_mesh"),
        ("partial", r"Partial\(sum\).*is a sum that is not added up.*redistribute"),
    ],
)
def test_what_no_layout_expresses_is_refused_on_all_ranks(case, words):
    messages = {refused[case] for _, refused in placements()}
    assert len(messages) == 1
    with pytest.raises(ValueError, match=words):
        raise ValueError(messages.pop())


def test_process_outside_of_the_mesh_is_told():
    messages = [refused["outside"] for _, refused in placements()]
    assert messages[:2] == [None, None]
    assert all("this process is not in its" in message for message in messages[2:])


def test_equal_ranks_are_one_axis_on_every_mesh():
    assert run_ranks(4, equal_ranks_are_one_axis) == [["zero", "zero", "zero2", "tp"]] * 4


def test_plain_tensors_are_whole_and_not_copied():
    plain = torch.nn.Parameter(torch.zeros(2, 3))
    assert not is_dtensor(plain)
    assert layout_of(plain, MeshAxes()) == Layout.whole((2, 3))
    assert local_values(plain).data_ptr() == plain.data_ptr()
    assert not local_values(plain).requires_grad
