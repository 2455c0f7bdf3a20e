"""Every private name of torch's FSDP that this package uses exists in the torch that is installed."""

import inspect
import re
import types

import pytest

from colossal_bcd.fsdp import torch_private

OLD = torch_private.VERSION < (2, 6)
NAMES = [
    ("_fsdp_param_group", "torch", OLD),
    ("_fsdp_collectives", "torch", OLD),
    ("_fsdp_state", "torch", OLD),
    ("_fsdp_param_group", "foreach_all_gather_copy_out", OLD),
    ("_fsdp_collectives", "_get_gradient_divide_factors", OLD),
]
"""Module, name, and whether this version is asked for it."""


@pytest.mark.parametrize(("module", "name", "asked"), NAMES)
def test_private_name_is_there(module, name, asked):
    if asked:
        torch_private.private(torch_private.module_of_fsdp(module), name, "a test")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("_fsdp_param", name) for name in (*torch_private.OF_PARAMS, "_unsharded_param")),
        ("_fsdp_state", "_states_to_backward_prefetch"),
    ],
)
def test_private_attribute_is_set(module, name):
    source = inspect.getsource(torch_private.module_of_fsdp(module))
    assert re.search(rf"self\.{name}(: [^=\n]+)? =", source)


def test_group_without_a_private_attribute_of_its_parameters_is_refused():
    group = types.SimpleNamespace(**dict.fromkeys(torch_private._OF_GROUPS))
    group.fsdp_params = [types.SimpleNamespace(sharded_param=None)]
    with pytest.raises(RuntimeError, match=r"no SimpleNamespace\.offload_to_cpu, which block coordinate descent needs"):
        torch_private.ShardGroup(None, group)


def test_missing_name_says_which_and_what_to_do():
    module = torch_private.module_of_fsdp("_fsdp_collectives")
    with pytest.raises(
        RuntimeError, match=r"has no .*_fsdp_collectives\.gone, which the switch of blocks needs. Use torch"
    ):
        torch_private.private(module, "gone", "the switch of blocks")
