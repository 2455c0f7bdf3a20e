"""Casts: which optimizer becomes what, with which numbers, and what is refused."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import bitsandbytes.optim
import colossalai.nn.optimizer as theirs
import pytest
import torch
from registry_cases import fused_lamb, param_groups, set_gradients, weights

import colossal_bcd
from colossal_bcd import BlockOptimizer, Lamb
from colossal_bcd.booster.casts import registry
from colossal_bcd.booster.casts.registry import cast

MAKERS = {
    "Lamb": lambda groups: theirs.Lamb(groups, lr=0.5, bias_correction=True, adam=True),
    "DistributedLamb": lambda groups: theirs.DistributedLamb(groups, lr=0.5, bias_correction=False),
    "FusedLAMB": lambda groups: fused_lamb(groups, lr=0.5),
    "LAMB": lambda groups: bitsandbytes.optim.LAMB(groups, lr=0.5),
    "LAMB32bit": lambda groups: bitsandbytes.optim.LAMB32bit(groups, lr=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_cast_carries_groups_and_defaults(name: str) -> None:
    source = MAKERS[name](param_groups(weights()))
    groups, before = list(source.param_groups), [dict(group) for group in source.param_groups]
    ours = cast(source)
    assert type(ours) is Lamb
    assert all(ours.param_groups[i] is group for i, group in enumerate(groups)), "a scheduler holds the old dicts"
    for group, old in zip(ours.param_groups, before, strict=True):
        for key in ("lr", "betas", "eps", "weight_decay", "params"):
            assert group[key] == old[key], key
    assert ours.param_groups[1]["note"] == "mine"
    ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    added = ours.param_groups[2]
    assert (added["lr"], added["eps"]) == (0.5, source.defaults["eps"])
    assert added["bias_correction"] == {"Lamb": "step_size", "DistributedLamb": False}.get(name, True)
    assert added["adam"] is (name == "Lamb")


@pytest.mark.parametrize("name", MAKERS)
def test_cast_refuses_state(name: str) -> None:
    source = MAKERS[name](weights())
    source.state[source.param_groups[0]["params"][0]]["step"] = 1
    with pytest.raises(ValueError, match=r"state of 1 parameters.*Boost before the first step"):
        cast(source)


def test_cast_keeps_hooks_and_their_handles() -> None:
    source = theirs.Lamb(weights())
    seen: list[str] = []
    kept = source.register_step_pre_hook(lambda *_: seen.append("pre"))
    source.register_step_post_hook(lambda *_: seen.append("post"))
    ours = cast(source)
    set_gradients(ours.param_groups[0]["params"], 0)
    ours.step()
    assert seen == ["pre", "post"]
    kept.remove()
    ours.step()
    assert seen == ["pre", "post", "post"]


def test_cast_keeps_a_scheduler_going_without_a_warning() -> None:
    source = theirs.Lamb(weights(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(source, lambda step: 0.5**step)
    ours = cast(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            assert ours.param_groups[0]["lr"] == 0.5**step
            set_gradients(ours.param_groups[0]["params"], step)
            ours.step()
            scheduler.step()


def test_cast_of_a_block_optimizer_casts_its_base() -> None:
    layer = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))})
    wrapped = BlockOptimizer(theirs.Lamb(layer.parameters(), adam=True), list(layer.named_parameters()), verbose=0)
    groups = wrapped.param_groups
    assert cast(wrapped) is wrapped
    assert type(wrapped.base_optimizer) is Lamb
    assert wrapped.param_groups[0] is groups[0]
    assert wrapped.param_groups[0]["adam"] is True


class NewName(theirs.Lamb):
    """Does not touch the update."""


class OtherStep(theirs.Lamb):
    def step(self, closure: Any = None) -> None:
        """Another update."""


class OtherUpdate(bitsandbytes.optim.LAMB):
    def update_step(self, *args: Any) -> None:
        """Another update, in bitsandbytes' way."""


class Grandchild(OtherStep):
    """Inherits the overridden step."""


class AdamChild(torch.optim.Adam):
    """Does not touch the update."""


class Unknown(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None: ...  # type: ignore[override]


def test_cast_takes_a_subclass_that_keeps_the_step() -> None:
    assert type(cast(NewName(weights()))) is Lamb


@pytest.mark.parametrize(
    ("cls", "parent"),
    [
        (OtherStep, "colossalai.nn.optimizer.Lamb"),
        (Grandchild, "colossalai.nn.optimizer.Lamb"),
        (OtherUpdate, "bitsandbytes.optim.LAMB"),
    ],
)
def test_cast_leaves_a_subclass_that_overrides_the_step(
    cls: Any, parent: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = cls(weights())
    assert cast(optimizer) is optimizer
    assert f"{cls.__name__} overrides the step of {parent}, so it is not cast" in caplog.text


def test_cast_warns_about_an_unknown_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = Unknown(weights())
    assert cast(optimizer) is optimizer
    assert "test_registry.Unknown is unknown here" in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        colossal_bcd.Lamb,
        colossal_bcd.AdamW,
        AdamChild,
        *(getattr(torch.optim, name) for name in sorted(registry.ELEMENTWISE["torch.optim"])),
        *(getattr(bitsandbytes.optim, name) for name in ("AdamW8bit", "PagedAdam", "Lion32bit", "AdEMAMix")),
    ],
)
def test_cast_leaves_elementwise_optimizers_alone(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = make(weights(), lr=1e-3)
    with caplog.at_level(logging.INFO):
        assert cast(optimizer) is optimizer
    assert caplog.messages == []


def instance(cls: Any) -> Any:
    """An object of the class without its constructor, which may need kernels, ranks or a model."""
    optimizer = cls.__new__(cls)
    torch.optim.Optimizer.__init__(optimizer, weights(), {"lr": 0.1})
    return optimizer


WHOLE = [
    *(getattr(torch.optim, name) for name in ("Adafactor", "LBFGS")),
    *(getattr(theirs, name) for name in sorted(registry.WHOLE_MATRIX["colossalai.nn.optimizer"])),
    *(getattr(bitsandbytes.optim, name) for name in sorted(registry.WHOLE_MATRIX["bitsandbytes.optim"])),
]


@pytest.mark.parametrize("cls", WHOLE)
def test_cast_refuses_whole_matrix_optimizers_without_an_equal(cls: Any) -> None:
    with pytest.raises(ValueError, match="computes with whole matrices and would train wrongly on shards"):
        cast(instance(cls))


@pytest.mark.parametrize("name", ["BlockOptimizer"])
def test_cast_refuses_badams_own_wrapper(name: str) -> None:
    cls = getattr(importlib.import_module("badam.block_optim"), name)
    with pytest.raises(ValueError, match=r"Import BlockOptimizer from colossal_bcd\.compat"):
        cast(instance(cls))


def test_every_name_in_the_tables_that_is_installed_is_a_class_of_that_name() -> None:
    """The tables named galore_torch's classes by what the package exports, so that none of them was recognised."""
    casts: dict[str, set[str]] = {}
    for home in registry.CASTS:
        casts.setdefault(home.rpartition(".")[0], set()).add(home.rpartition(".")[2])
    tables = (registry.ELEMENTWISE, registry.WHOLE_MATRIX, registry.BLOCKWISE, casts)
    known, missing = set(), set()
    for package in {package for table in tables for package in table}:
        try:
            module = importlib.import_module(package)
        except ImportError:
            continue
        exported = {id(cls): cls for cls in vars(module).values() if isinstance(cls, type)}.values()
        found = {name for cls in exported if (name := registry._known(cls)) is not None}
        named = {f"{package}.{name}" for table in tables for name in table.get(package, ())}
        known |= found
        missing |= named - found
    # Muon came with torch 2.9; AdamW has left transformers.
    assert missing <= {"torch.optim.Muon", "transformers.optimization.AdamW"}
    assert known >= {f"{package}.{name}" for package, names in casts.items() for name in names}
