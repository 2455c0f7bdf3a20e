"""Options as values, and the flat keywords that stand for their fields."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from block_net import Net, adamw, train, weights

from colossal_bcd import BlockOptimizer
from colossal_bcd.block import (
    CorrectionOptions,
    ImportanceOptions,
    LionCorrection,
    LoraOptions,
    ResidualOptions,
)
from colossal_bcd.block.options import ARGUMENTS, KEYWORDS


def made(model: Net, **options: Any) -> BlockOptimizer:
    return BlockOptimizer(
        adamw(model), list(model.named_parameters()), switch_block_every=2, switch_mode="importance", **options
    )


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "correction": (
        {"correction": CorrectionOptions(sgd_mode="all", sgd_lr_scaling=0.5, correction=LionCorrection())},
        {"sgd_mode": "all", "sgd_lr_scaling": 0.5, "correction": LionCorrection()},
    ),
    "sign": (
        {"correction": CorrectionOptions(sgd_mode="partial", sgd_use_sign=True)},
        {"sgd_mode": "partial", "sgd_use_sign": True},
    ),
    "residual": (
        {"residual": ResidualOptions(bits=8, offload=True)},
        {"residual": "keep", "residual_bits": 8, "residual_offload": True},
    ),
    "importance": (
        {"importance": ImportanceOptions(by="weight", floor=0.5)},
        {"importance": "weight", "importance_floor": 0.5},
    ),
    "lora": ({"lora": LoraOptions(adapter_state="reset")}, {"adapter_state": "reset"}),
}


@pytest.mark.parametrize(("values", "flat"), SAME.values(), ids=SAME)
def test_option_values_and_flat_keywords_are_the_same(values: dict[str, Any], flat: dict[str, Any]) -> None:
    models = [Net(dtype=torch.bfloat16) for _ in range(2)]
    optimizers = [made(model, **options) for model, options in zip(models, (values, flat), strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 5)
    assert optimizers[0].identity() == optimizers[1].identity()
    assert all(map(torch.equal, *map(weights, models)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": ResidualOptions(), "residual_bits": 8}, "residual: got a ResidualOptions and residual_bits"),
        (
            {"correction": CorrectionOptions(sgd_mode="all"), "sgd_use_sign": True},
            "correction: got a CorrectionOptions and sgd_use_sign",
        ),
        ({"importance": ImportanceOptions(), "importance_floor": 0.1}, "importance: got a ImportanceOptions and"),
        ({"lora": LoraOptions(), "lora_mode": None}, "lora: got a LoraOptions and lora_mode"),
    ],
)
def test_options_are_given_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(Net(), **options)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("sgd_modes", "sgd_mode"), ("include_head", "include_lm_head"), ("switch_every", "switch_block_every")],
)
def test_options_refuse_a_misspelt_keyword_and_name_the_nearest(wrong: str, nearest: str) -> None:
    """Nothing that is accepted has no effect: `**flat` takes what it knows."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument {wrong!r}, .* {nearest!r} is nearest"):
        made(Net(), **{wrong: 1})


def test_options_have_every_keyword_of_the_constructor_once() -> None:
    named = [name for name, p in inspect.signature(BlockOptimizer).parameters.items() if p.kind == p.KEYWORD_ONLY]
    assert set(named) <= set(ARGUMENTS)
    assert not (set(ARGUMENTS) - {"correction"}).intersection(KEYWORDS)
    assert len(inspect.signature(BlockOptimizer).parameters) <= 12


def test_options_warn_of_a_scaling_without_effect_where_the_user_calls() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made(Net(), sgd_lr_scaling=0.5)
    assert [(str(each.message)[:18], each.filename) for each in caught] == [("sgd_lr_scaling=0.5", __file__)]
