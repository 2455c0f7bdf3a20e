"""Sharded weights under the booster: training, against loops on one process."""

from __future__ import annotations

import re
from typing import Any

import fsdp_plugin_cases as cases
import models
import pytest
import torch
from fsdp_plugin_cases import LAYERS, Case
from torch.distributed.tensor.parallel import ColwiseParallel

from colossal_bcd.fsdp.tensor_parallel import styles_of
from colossal_bcd.testing import run_ranks

BF16: Any = {"dtype": torch.bfloat16}
F64: Any = {"dtype": torch.float64}
PLAIN: Any = {**F64, "blocks": False}
TWO_PASSES: Any = {"turns": 2 * LAYERS}

EQUAL = {
    "two passes": Case(**TWO_PASSES),
    "two passes bf16": Case(**TWO_PASSES, **BF16),
    "weights stay": Case(**BF16, options={"reshard_after_forward": False}),
    "offload": Case(**BF16, options={"cpu_offload": True}),
    "checkpointing": Case(**BF16, options={"gradient_checkpointing": True}),
    "plain bf16": Case(**BF16, blocks=False),
    "plain offload bf16": Case(**BF16, blocks=False, options={"cpu_offload": True}),
}
CLOSE = {
    "clip": Case(**F64, base="sgd", options={"max_norm": 0.5}),
    "clip by user": Case(**F64, base="sgd", clip=0.5),
    "two reductions": Case(**F64, base="sgd", accumulate=2),
    "no_sync": Case(**F64, base="sgd", accumulate=2, sync=False),
    "lamb blocks": Case(**F64, base="lamb"),
    "plain lamb": Case(**PLAIN, base="lamb"),
    "plain came": Case(**PLAIN, base="original came"),
    "plain adafactor": Case(**PLAIN, base="adafactor"),
    "plain galore": Case(**PLAIN, base="galore"),
    "plain golore": Case(**PLAIN, base="golore"),
    "plain galore sgd": Case(**PLAIN, base="galore sgd"),
    "plain galore adafactor": Case(**PLAIN, base="galore adafactor"),
    "plain adamw": Case(**PLAIN),
    "plain two reductions": Case(**PLAIN, base="sgd", accumulate=2),
    "plain clip": Case(**PLAIN, base="sgd", options={"max_norm": 0.5}),
    "plain clip by user": Case(**PLAIN, base="sgd", clip=0.5),
    "plain no_sync": Case(**PLAIN, base="sgd", accumulate=2, sync=False),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_ranks(2, cases.everything, EQUAL | CLOSE)[0]


@pytest.fixture(scope="module")
def on_two(found: dict[str, Any]) -> dict[str, Any]:
    return found["errors"]


@pytest.mark.parametrize("name", EQUAL)
def test_training_on_two_ranks_is_bit_equal_to_one_process(on_two: dict[str, Any], name: str) -> None:
    assert on_two[name]["equal"], on_two[name]


@pytest.mark.parametrize("name", CLOSE)
def test_training_on_two_ranks_is_one_process_in_float64(on_two: dict[str, Any], name: str) -> None:
    assert on_two[name]["losses"] <= 1e-12
    assert on_two[name]["weights"] <= 1e-12


def test_boosting_says_once_how_the_model_is_sharded_and_that_whole_gradients_travel(found: Any) -> None:
    assert [line for line in found["said"] if "136896 values in 6 groups of FSDP2, over 2 of 2 ranks" in line]
    assert [line.partition(":")[0] for line in found["said"] if "reduces whole gradients" in line] == ["GaLoreAdamW"]


def test_gradients_travel_in_the_dtype_that_is_asked_for(found: Any) -> None:
    # Each of two addends, and their sum, is rounded to 8 binary digits; 1e-5 is far above float32's rounding.
    assert 1e-5 < found["reduction"] <= 3 * 2**-8


TP: Any = {"data_ranks": 2}
ON_FOUR = {
    "hsdp": Case(**F64, base="sgd", options={"replicate_size": 2, "max_norm": 0.5}),
    "hsdp no_sync": Case(**F64, base="sgd", accumulate=2, sync=False, options={"replicate_size": 2}),
    "hsdp plain lamb": Case(**PLAIN, base="lamb", options={"replicate_size": 2}),
    "tp2": Case(**F64, base="sgd", **TP, options={"tp_size": 2, "max_norm": 0.5}),
    "tp2 plain came": Case(**PLAIN, base="original came", **TP, options={"tp_size": 2}),
    "tp2 plain": Case(**PLAIN, base="sgd", clip=0.5, **TP, options={"tp_size": 2}),
    "tp2 of two copies": Case(**F64, base="sgd", **TP, options={"tp_size": 2, "replicate_size": 2}),
    "kept over two": Case(**F64, base="sgd", options={"reshard_after_forward": 2}),
}


@pytest.fixture(scope="module")
def on_four() -> dict[str, Any]:
    return run_ranks(4, cases.errors, ON_FOUR)[0]


@pytest.mark.parametrize("name", ON_FOUR)
def test_training_on_four_ranks_is_one_process_in_float64(on_four: dict[str, Any], name: str) -> None:
    assert on_four[name]["losses"] <= 1e-12
    assert on_four[name]["weights"] <= 1e-12


def test_training_on_copies_shards_and_tensor_parallel_ranks_is_one_process_in_float64() -> None:
    options = {"tp_size": 2, "replicate_size": 2, "max_norm": 0.5}
    case = Case(**F64, base="sgd", data_ranks=4, options=options)
    errors = run_ranks(8, cases.errors, {"blocks": case}, timeout=600)[0]["blocks"]
    assert errors["losses"] <= 1e-12
    assert errors["weights"] <= 1e-12


REFUSED = {
    "precision": r"got precision='fp16', expected 'bf16' or 'fp32'.*LowLevelZeroPlugin\(precision='fp16'\)",
    "max_norm": r"got max_norm=-1, expected a number of at least 0",
    "reduce_dtype": r"got reduce_dtype=torch.int32, expected a floating torch.dtype",
    "tp_size": r"got tp_size=0, expected a number of ranks",
    "product": r"tp_size=2 and replicate_size=2 on 2 ranks, expected their product to divide",
    "tp_plan": r"got a tp_plan with tp_size=1, which divides nothing. Pass tp_size",
    "reshard": r"got reshard_after_forward=2 and 2 ranks that share a model",
    "dtypes": r"got weights of \['torch.float32', 'torch.float64'\], expected one.*precision='bf16'",
    "meta": r"got weights on the meta device, expected values",
    "checkpointing": r"got a Linear without gradient_checkpointing_enable",
    "plan": r"got a Linear without a plan.*Pass tp_plan=",
    "plan name": r"'nowhere' matches no module",
    "plan style": r"got 'diagonal', expected one of colwise",
    "heads": r"num_key_value_heads=3, expected a multiple",
    "relora": r"ReLoRaLinear layers.*GoLoreAdamW",
    "whole": r"Adafactor computes with whole matrices.*Use colossal_bcd.Adafactor",
    "wrapped": r"got a ModelWrapper that is wrapped or sharded already",
}
LATE = {
    "closure": r"call backward, then step\(\)",
    "group": r"add_param_group.*Add them before boosting",
    "again": r"a model that has been boosted with an optimizer",
    "p-norm": r"norm_type=1.0, expected 2",
    "thawed": r"a weight that was thawed.*freeze it afterwards",
    "inside no_sync": r"nothing",
    "kept back": r"has not reduced the gradients",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_wrongly_is_refused_before_anything_is_sent(found: Any, name: str) -> None:
    assert re.search(REFUSED[name], found["refused"][name]), found["refused"][name]


@pytest.mark.parametrize("name", LATE)
def test_what_comes_after_boosting_is_refused_with_the_remedy(found: Any, name: str) -> None:
    assert re.search(LATE[name], found["late"][name]), found["late"][name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_live_bytes_are_those_of_the_estimate(found: Any, dtype: torch.dtype) -> None:
    """Ranks divide all weights here.  Of two tokens there are few activations."""
    moments = found["bytes"][dtype]
    for name in ("between steps", "after backward", "in step"):
        measured, want = moments[name]
        assert measured == pytest.approx(want, abs=1024), name
    for name in ("forward", "backward"):
        measured, want = moments[name]
        assert measured == pytest.approx(want, rel=0.01), name
    low = dtype == torch.bfloat16
    formula = f"({2 if low else 4}M + {16 if low else 12}b)/N with M = 136896, b = 34944 in the largest block, N = 2"
    assert formula in moments["line"]
    assert moments["peak"] >= max(moments[name][1] for name in ("in step", "forward", "backward"))


def test_explain_has_rows_of_the_active_block(found: Any) -> None:
    assert "model.layers.2.mlp.up_proj.weight" in found["table"]
    assert "96x64, flat zero 0/2" in found["table"]
    assert "step 0: model.layers.2 of 3 blocks" in found["table"]


def test_adapters_alone_train_and_are_saved_as_peft_does(found: Any) -> None:
    assert found["lora"]["changed"] == {True}
    assert len(found["lora"]["saved"]) == found["lora"]["adapters"]
    assert all(found["lora"]["saved"])
    assert "LowLevelZeroPlugin" in found["lora"]["quantized"]


def test_overrides_of_bitsandbytes_follow_the_sharded_weights(found: Any) -> None:
    assert found["overrides"] == [32, 8]


def test_a_share_of_every_tensor_trains_as_under_zero(found: Any) -> None:
    assert found["ratio"] <= 1e-12


def test_models_are_saved_whole_and_loaded_in_the_middle_of_a_run(found: Any) -> None:
    """Float32 masters of before would overwrite what was loaded at the next step."""
    files = found["files"]
    assert "got a checkpoint without [] and with ['model.layers.3" in files.pop("other")
    assert files == dict.fromkeys(files, True)
    assert len(files) == 7


def test_a_head_that_is_tied_or_does_not_divide_stays_whole() -> None:
    plan = {
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "lm_head": "colwise_rep",
    }
    assert "lm_head" in styles_of(models.llama(), 2, plan)
    assert "lm_head" not in styles_of(models.llama(tied=True), 2, plan)
    assert "lm_head" not in styles_of(models.llama(vocab=251), 2, plan)
    plan["model.layers.*.mlp.up_proj"] = ColwiseParallel()
    model = models.llama()
    model.config.num_attention_heads = model.config.num_key_value_heads = 5
    with pytest.raises(ValueError, match=r"up_proj' has a weight of \(96, 64\), expected ColwiseParallel to divide"):
        styles_of(model, 5, plan)
