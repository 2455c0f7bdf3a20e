"""ColossalAI's own plugins after `install()`: the step on given gradients equals the textbook's on whole tensors."""

from __future__ import annotations

import install_cases
import pytest
import torch

from colossal_bcd import Lamb
from colossal_bcd.booster.layouts import runs
from colossal_bcd.booster.stock_plugins import cast_for_stock_plugin, distributed_class
from colossal_bcd.testing import run_ranks

HYBRID = {"plugin": "hybrid", "tp_size": 2}
CASES = {
    "zero1-1": (1, {"plugin": "zero", "stage": 1}, "ours", "llama", 250, 0),
    "zero1-2": (2, {"plugin": "zero", "stage": 1}, "theirs", "llama", 250, 1),
    "zero2-2": (2, {"plugin": "zero", "stage": 2}, "ours", "gpt2", 250, 1),
    "zero2-3": (3, {"plugin": "zero", "stage": 2}, "compat", "llama", 250, 1),
    "zero2-extra-dp-4": (4, {"plugin": "zero", "stage": 2, "extra_dp_size": 2}, "ours", "llama", 250, 1),
    "tp2": (2, {**HYBRID, "zero_stage": 0}, "theirs", "llama", 1000, 1),
    "tp2-fp32": (2, {**HYBRID, "zero_stage": 0, "precision": "fp32"}, "ours", "gpt2", 250, 1),
    "tp2-padded-to-double": (2, {**HYBRID, "zero_stage": 0}, "theirs-distributed", "llama", 64, 1),
    "tp2-zero2-dp1": (2, {**HYBRID, "zero_stage": 2}, "ours", "gpt2", 250, 1),
    "tp2-zero1-dp2": (4, {**HYBRID, "zero_stage": 1}, "ours", "gpt2", 1000, 2),
    "tp2-zero2-dp2": (4, {**HYBRID, "zero_stage": 2}, "theirs", "llama", 1000, 2),
    "zero2-2-adafactor": (2, {"plugin": "zero", "stage": 2}, "adafactor", "llama", 250, 2),
    "tp2-zero2-dp2-adafactor": (4, {**HYBRID, "zero_stage": 2}, "transformers-adafactor", "llama", 1000, 4),
    "tp2-adafactor": (2, {**HYBRID, "zero_stage": 0}, "compat-adafactor", "gpt2", 250, 2),
    "tp2-came": (2, {**HYBRID, "zero_stage": 0}, "came", "llama", 1000, 3),
    "zero2-2-came": (2, {"plugin": "zero", "stage": 2}, "distributed-came", "gpt2", 250, 3),
    "zero2-3-galore": (3, {"plugin": "zero", "stage": 2}, "galore-adafactor", "llama", 250, 4),
    "tp2-zero2-dp2-galore": (4, {**HYBRID, "zero_stage": 2}, "galore-adafactor", "gpt2", 1000, 7),
    "pp2-zero1-dp2": (
        4,
        {"plugin": "hybrid", "tp_size": 1, "pp_size": 2, "zero_stage": 1, "num_microbatches": 1},
        "theirs",
        "llama",
        256,
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_installed_stock_plugin_step_equals_textbook(case: str) -> None:
    """Two stories: ColossalAI passes no map at stage 0 (tp2 in bf16) nor on one data-parallel rank, and shards were
    taken as wholes; it replaces the group dicts under a pipeline, and schedulers lost the cast optimizer.
    """
    num_ranks, options, optimizer, kind, vocab, collectives = CASES[case]
    for result in run_ranks(num_ranks, install_cases.injected, optimizer, kind, vocab, options):
        assert result["error"] <= result["bound"]
        assert result["calls"] == ({"all_reduce": collectives} if collectives else {})
        assert result["warnings"] == []


@pytest.mark.parametrize("optimizer", ["ours", "theirs"])
def test_installed_stock_plugin_trains_as_ours(optimizer: str) -> None:
    """Real losses under a clipped norm; the engines round their bf16 gradient averages alike on two ranks."""
    stock = run_ranks(2, install_cases.train, optimizer, "stock")
    ours = run_ranks(2, install_cases.train, optimizer, "ours")
    torch.testing.assert_close(torch.tensor(stock), torch.tensor(ours), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pipeline", "without a map between them"),
        ("sequence", "ColossalAI divides it over other ranks"),
        ("block", "Change the plugin's import line"),
        ("lars", "computes with whole matrices"),
    ],
)
def test_installed_stock_plugin_refuses(what: str, message: str) -> None:
    for error in run_ranks(2, install_cases.refused, what):
        assert message in error


def test_without_install_nothing_changes_and_a_lost_parameter_raises() -> None:
    """The stock plugin swaps parameters for flat shards; ours must not take them for whole tensors."""
    for result in run_ranks(2, install_cases.without_install):
        assert "without a layout" in result.pop("error")
        assert result == {"function": "colossalai.nn.optimizer", "plugin": True, "table": True}


def test_install_twice_changes_nothing() -> None:
    assert run_ranks(1, install_cases.installed_twice) == [{"same": True, "none": True}]


def test_install_enters_the_table() -> None:
    (found,) = run_ranks(1, install_cases.table_entries)
    assert found.pop("ours")
    names = ("Adafactor", "CAME", "DistributedAdaFactor", "DistributedCAME", "DistributedLamb", "Lamb")
    assert found == dict.fromkeys((*names, "DistGaloreAwamW", "GaLoreAdamW8bit"), (True, 0.25, True))


def test_distributed_class_keeps_the_object_and_its_type() -> None:
    optimizer = Lamb([torch.nn.Parameter(torch.ones(3))])
    boosted = cast_for_stock_plugin(optimizer)
    assert boosted is optimizer
    assert type(boosted) is distributed_class(Lamb)
    assert cast_for_stock_plugin(boosted) is optimizer
    assert type(boosted) is distributed_class(Lamb)
    boosted.param_groups[0]["params"][0].grad = torch.ones(3)
    boosted.step()
    assert not torch.equal(boosted.param_groups[0]["params"][0], torch.ones(3))


def test_setup_distributed_with_a_foreign_map_raises() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = cast_for_stock_plugin(Lamb([weight]))
    master = torch.ones(6)
    optimizer.param_groups[0]["params"] = [master]
    with pytest.raises(ValueError, match="without a map between them"):
        optimizer.setup_distributed(shard_to_working_param={id(master): torch.ones(2, 3)})


def test_setup_distributed_with_a_shard_that_does_not_follow_raises() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = cast_for_stock_plugin(Lamb([weight]))
    weight.data = torch.ones(3, 2)
    with pytest.raises(ValueError, match="does not follow from the global shape"):
        optimizer.setup_distributed()


@pytest.mark.parametrize("sections", [(6, 2, 4), (4, 4, 4), (8,)])
def test_sections_are_read_from_what_each_rank_holds(sections: tuple[int, ...]) -> None:
    whole = torch.arange(sum(sections))
    for rank in range(2):
        held = torch.cat([part.chunk(2)[rank] for part in whole.split(sections)])
        assert runs(held, 2) == sections
