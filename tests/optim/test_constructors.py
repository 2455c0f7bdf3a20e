"""Constructors: few parameters, options as values or under flat keys, and refusals that name what was meant."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from test_accepted import CLASSES
from torch import nn

import colossal_bcd
from colossal_bcd import AdamW, BlockOptimizerRatio, GaLoreAdamW, GaLoreSGD, GoLoreAdamW, Projection, Storage

OURS = [name for name, cls in CLASSES.items() if cls is not BlockOptimizerRatio]
"""All but the one whose constructor is BAdam's."""
PACKAGE = Path(colossal_bcd.__file__).parent


def weights():
    return [nn.Parameter(torch.ones(8, 6))]


@pytest.mark.parametrize("name", OURS)
def test_constructors_have_at_most_twelve_parameters(name):
    """They had up to 27, and every hyper-parameter was written in three lists."""
    assert len(inspect.signature(CLASSES[name].__init__).parameters) - 1 <= 12


@pytest.mark.parametrize("name", OURS)
def test_signatures_show_every_hyper_parameter_with_its_default(name):
    cls = CLASSES[name]
    parameters = inspect.signature(cls).parameters
    assert set(cls.hyper_keys()) - set(parameters) == set(cls.fixed)
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())


def test_no_file_builds_anything_from_locals():
    assert [str(path) for path in PACKAGE.rglob("*.py") if "locals()" in path.read_text()] == []


def test_options_as_values_are_those_under_flat_keys():
    values = GaLoreAdamW(
        weights(), 0.1, projection=Projection(rank=2, gap=7), storage=Storage(rounding="stochastic", moment_bits=8)
    )
    flat = GaLoreAdamW(weights(), lr=0.1, rank=2, update_proj_gap=7, rounding="stochastic", moment_bits=8)
    assert values.defaults == flat.defaults
    hyper = flat.hyper_of(flat.param_groups[0])
    assert (hyper.gap, hyper.rank, hyper.moment_bits, hyper.lr) == (7, 2, 8, 0.1)


def test_options_given_twice_are_refused():
    with pytest.raises(TypeError, match="GaLoreSGD: got projection= and rank beside it"):
        GaLoreSGD(weights(), projection=Projection(rank=2), rank=2)
    with pytest.raises(TypeError, match="AdamW: got storage= and seed beside it"):
        AdamW(weights(), storage=Storage(rounding="stochastic"), seed=3)


def test_golore_takes_its_first_random_step_from_the_value_too():
    optimizer = GoLoreAdamW(weights(), projection=Projection(rank=2, random_from_step=4))
    group = optimizer.param_groups[0]
    assert (group["random_from_step"], group["reproject_momentum"]) == (4, True)
    with pytest.raises(TypeError, match="reproject_momentum"):
        GoLoreAdamW(weights(), rank=2, total_steps=3, reproject_momentum=False)
    # The value's step won without a word.
    with pytest.raises(TypeError, match="GoLoreAdamW: got projection= and random_from_step beside it"):
        GoLoreAdamW(weights(), projection=Projection(rank=2, random_from_step=4), random_from_step=7)


def test_projected_sgd_refuses_a_decay_that_it_cannot_have():
    GaLoreSGD(weights(), rank=2, decoupled_weight_decay=True)
    with pytest.raises(ValueError, match="decoupled_weight_decay: got False, expected True"):
        GaLoreSGD(weights(), rank=2, decoupled_weight_decay=False)


@pytest.mark.parametrize("name", ["Lion", "GaLoreLion", "GoLoreLion", "GaLoreSGD"])
def test_classes_that_are_made_by_a_table_can_be_pickled(name):
    extra = {"rank": 2} if "Lore" in name else {}
    extra |= {"random_from_step": 4} if "GoLore" in name else {}
    optimizer = CLASSES[name](weights(), lr=0.1, **extra)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is CLASSES[name]
        assert copied.defaults.items() >= optimizer.defaults.items()  # torch adds one of its own


@pytest.mark.parametrize(
    ("cls", "key", "meant"),
    [
        (AdamW, "weight_dekay", "weight_decay"),
        (GaLoreAdamW, "update_gap", "update_proj_gap"),
        (AdamW, "wd", "weight_decay"),
    ],
)
def test_unknown_arguments_name_the_nearest(cls, key, meant):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'; did you mean '{meant}'"):
        cls(weights(), **{key: 1})


@pytest.mark.parametrize(
    ("name", "rule"), [("AdamW", "AdamW"), ("GaLoreSGD", "GaLoreSGD"), ("GoLoreAdamW8bit", "GaLoreAdamW8bit")]
)
def test_subclasses_share_the_name_of_their_rule(name, rule):
    """Checkpoints have it: GoLore loads those of GaLore, and none of another inner rule."""
    options = {"rank": 2} if "Lore" in name else {}
    options |= {"total_steps": 3} if name.startswith("GoLore") else {}
    assert CLASSES[name](weights(), **options).rule_name == rule
