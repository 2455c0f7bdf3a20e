"""What user code writes between two calls of the engine counts: weights, gradients, learning rates."""

from __future__ import annotations

from typing import Any

import outside_cases
import pytest
import torch

from colossal_bcd import BlockOptimizer
from colossal_bcd.engine.config import LowRankOptions
from colossal_bcd.testing import run_ranks

WRITTEN: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "zero1-bf16": {"plugin": "zero", "stage": 1, "precision": "bf16"},
        "zero2-fp32": {"plugin": "zero", "stage": 2, "precision": "fp32"},
        "zero2-blocks": {"plugin": "zero", "stage": 2, "precision": "bf16", "blocks": True},
        "zero1-offload": {"plugin": "zero", "stage": 1, "precision": "bf16", "cpu_offload": True},
        "zero1-overlap": {"plugin": "zero", "stage": 1, "precision": "bf16", "overlap_allgather": True},
        "hybrid0-fp32": {"plugin": "hybrid", "zero_stage": 0, "tp_size": 1, "pp_size": 1, "precision": "fp32"},
        "hybrid0-bf16": {"plugin": "hybrid", "zero_stage": 0, "tp_size": 1, "pp_size": 1, "precision": "bf16"},
        "hybrid2-bf16": {"plugin": "hybrid", "zero_stage": 2, "tp_size": 1, "pp_size": 1, "precision": "bf16"},
        "ddp-blocks": {"plugin": "ddp", "blocks": True},
        "fsdp2-bf16": {"plugin": "fsdp", "precision": "bf16"},
        "fsdp2-fp32": {"plugin": "fsdp", "precision": "fp32", "reshard_after_forward": False},
        "fsdp2-blocks": {"plugin": "fsdp", "precision": "bf16", "blocks": True},
        "fsdp2-offload": {"plugin": "fsdp", "precision": "bf16", "cpu_offload": True},
    },
    4: {
        "fsdp2-hsdp": {"plugin": "fsdp", "precision": "bf16", "replicate_size": 2},
        "fsdp2-tp2": {"plugin": "fsdp", "precision": "bf16", "tp_size": 2, "blocks": True},
        "tp2-zero1": {"plugin": "hybrid", "zero_stage": 1, "tp_size": 2, "pp_size": 1, "precision": "bf16"},
        "tp2-zero0": {"plugin": "hybrid", "zero_stage": 0, "tp_size": 2, "pp_size": 1, "precision": "fp32"},
        "pp2-zero1": {
            "plugin": "hybrid",
            "zero_stage": 1,
            "tp_size": 1,
            "pp_size": 2,
            "num_microbatches": 1,
            "precision": "bf16",
        },
    },
}
ROUNDING = 2 * len(outside_cases.WRITES) * 8 * 2.0**-24
"""Bound of a master's error: in each step float32 rounds a weight of at most 2, and an update that is smaller, a few
times.  What bfloat16 cuts off is 2^-9 of a weight, 500 times as much for the weights near 0.02 and more for others."""


@pytest.mark.parametrize("num_ranks", WRITTEN)
def test_outside_written_weights_are_followed(num_ranks: int) -> None:
    """Masters overwrote them at the next step, under every plugin; one process did not notice writes through `data`."""
    for result in run_ranks(num_ranks, outside_cases.each, outside_cases.written_weights, WRITTEN[num_ranks]):
        wrong = [(c, w, e) for c, errors in result.items() for w, e in errors.items() if not e <= ROUNDING]
        assert not wrong


OWN = list(outside_cases.OWN)
OF_DTENSORS = [name for name in outside_cases.EDITS if name != "noise"]
"""torch itself refuses to add a plain tensor to a DTensor."""
HYBRID = {"plugin": "hybrid", "tp_size": 1, "pp_size": 1, "precision": "fp32"}
EDITED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "zero1": {"plugin": "zero", "stage": 1, "precision": "fp32"},
        "zero1-no-overlap": {"plugin": "zero", "stage": 1, "precision": "fp32", "overlap_communication": False},
        "zero1-blocks": {"plugin": "zero", "stage": 1, "precision": "fp32", "blocks": True},
        "zero1-max-norm": {"plugin": "zero", "stage": 1, "precision": "fp32", "max_norm": 0.3, "edits": OWN},
        "zero2": {"plugin": "zero", "stage": 2, "precision": "fp32", "edits": OWN},
        "zero2-blocks": {"plugin": "zero", "stage": 2, "precision": "fp32", "blocks": True, "edits": OWN},
        "hybrid0": {**HYBRID, "zero_stage": 0, "accumulates": True},
        "ddp": {"plugin": "ddp", "dtype": torch.float32, "accumulates": True},
        "ddp-blocks": {"plugin": "ddp", "dtype": torch.float32, "blocks": True},
        "fsdp2": {"plugin": "fsdp", "precision": "fp32", "edits": OF_DTENSORS},
        "fsdp2-blocks": {"plugin": "fsdp", "precision": "fp32", "blocks": True, "edits": OF_DTENSORS},
        "fsdp2-max-norm": {"plugin": "fsdp", "precision": "fp32", "max_norm": 0.3, "edits": OWN},
    },
    4: {
        "tp2-zero1": {**HYBRID, "tp_size": 2, "zero_stage": 1, "edits": OWN},
        "tp2-zero0": {**HYBRID, "tp_size": 2, "zero_stage": 0, "edits": OWN, "accumulates": True},
        "pp2-zero1": {**HYBRID, "pp_size": 2, "zero_stage": 1, "num_microbatches": 2, "edits": OWN},
        "pp2-zero0": {**HYBRID, "pp_size": 2, "zero_stage": 0, "num_microbatches": 2, "edits": OWN, "max_norm": 0.3},
    },
}
GRADIENTS = 1e-5
"""Bound after three steps of SGD: sums of gradients of up to 1 over two ranks and 32 tokens round to 2^-24 each, in
another order than on one process; without an edit weights would be off by 1e-2, as clipping divides by more than 2."""


@pytest.mark.parametrize("num_ranks", EDITED)
def test_outside_edited_gradients_equal_one_process(num_ranks: int) -> None:
    """`clip_grad_norm_` saw no gradients and returned 0.0; `clip_grad_by_norm` was refused."""
    for result in run_ranks(num_ranks, outside_cases.each, outside_cases.edited_gradients, EDITED[num_ranks]):
        wrong = [(c, w, e) for c, errors in result.items() for w, e in errors.items() if not e <= GRADIENTS]
        assert not wrong


PARTS: dict[str, dict[str, Any]] = {
    "zero2": {"plugin": "zero", "stage": 2, "precision": "fp32"},
    "zero2-blocks": {"plugin": "zero", "stage": 2, "precision": "bf16", "blocks": True},
    "tp2": {**HYBRID, "tp_size": 2, "zero_stage": 1},
    "low-rank": {"plugin": "zero", "stage": 1, "precision": "bf16", "galore": True},
    "fp16": {"plugin": "zero", "stage": 1, "precision": "fp16", "dtype": torch.float16, "initial_scale": 2**8},
}


def test_outside_gradients_that_are_parts_say_so() -> None:
    """`clip_grad_norm_` returned 0.0 where gradients are sharded, and training went on without clipping."""
    for result in run_ranks(2, outside_cases.each, outside_cases.refused, PARTS):
        for config, said in result.items():
            for what in ("norm", "value", "read", "write", "past"):
                assert said[what].startswith("ValueError: param.grad: got "), (config, what, said[what])
                assert "optimizer.clip_grad_by_norm" in said[what]
            assert said["repr"].startswith("ShardedGradient(shape=")
            assert "was given a gradient by hand" in said["given"], config
            assert said["model.zero_grad"] == "unchanged: True", config
            low_rank = config == "low-rank"
            for what in ("clip_grad_by_norm", "clip_grad_by_value"):
                assert said[what].startswith(f"ValueError: {what}: got low-rank" if low_rank else "no error"), config


def test_outside_consumed_gradients_are_said_once() -> None:
    configs: dict[str, dict[str, Any]] = {
        "zero1": {"plugin": "zero", "stage": 1, "precision": "fp32"},
        "hybrid0-bf16": {**HYBRID, "zero_stage": 0, "precision": "bf16"},
        "hybrid0-fp32": {**HYBRID, "zero_stage": 0},
        "ddp-blocks": {"plugin": "ddp", "blocks": True},
    }
    first, second = run_ranks(2, outside_cases.each, outside_cases.said_once, configs)
    for config, counts in first.items():
        assert counts == {"zero_grad=True": 0, "zero_grad=False": int(config != "hybrid0-fp32")}, config
        assert not any(second[config].values()), "rank 0 speaks"


def test_outside_clipping_knows_the_loss_scale() -> None:
    low_rank = LowRankOptions(clip_by_image=True)
    configs: dict[str, dict[str, Any]] = {
        "fp16": {"plugin": "zero", "stage": 2, "precision": "fp16", "dtype": torch.float16, "initial_scale": 2**8},
        "fp16-hybrid0": {**HYBRID, "zero_stage": 0, "precision": "fp16", "dtype": torch.float16, "initial_scale": 2**8},
        "images": {"plugin": "zero", "stage": 2, "precision": "bf16", "galore": True, "low_rank": low_rank},
        "images-tp": {
            **HYBRID,
            "tp_size": 2,
            "zero_stage": 1,
            "precision": "bf16",
            "galore": True,
            "low_rank": low_rank,
        },
    }
    for result in run_ranks(2, outside_cases.each, outside_cases.scaled_norm, configs):
        for config, norms in result.items():
            for step in range(2):
                assert 0.125 < norms[f"before {step}"] < 16, "without the loss scale"
                # Gradients are rounded to 2^-9 (bfloat16) or 2^-11 of themselves after they are scaled.
                torch.testing.assert_close(norms[f"again {step}"], 0.125, rtol=2**-8, atol=0, msg=config)
                torch.testing.assert_close(norms[f"step {step}"], 0.125, rtol=2**-8, atol=0, msg=config)


def test_outside_saved_masters_follow_weights() -> None:
    """Masters in a checkpoint were those before a write between the last step and the save."""
    configs: dict[str, dict[str, Any]] = {
        "zero1": {"plugin": "zero", "stage": 1, "precision": "bf16"},
        "zero2-blocks": {"plugin": "zero", "stage": 2, "precision": "bf16", "blocks": True},
        "hybrid0": {**HYBRID, "zero_stage": 0, "precision": "bf16"},
        "fsdp2": {"plugin": "fsdp", "precision": "bf16"},
        "fsdp2-blocks": {"plugin": "fsdp", "precision": "bf16", "blocks": True},
    }
    for result in run_ranks(2, outside_cases.each, outside_cases.saved_masters, configs):
        assert result == {config: {"clamp_": True, "data.mul_": True} for config in configs}


def test_outside_groups_written_by_hand_count() -> None:
    """In the engine's groups and in those of the user's optimizer, under schedulers made before and after boosting."""
    configs: dict[str, dict[str, Any]] = {
        "zero1": {"plugin": "zero", "stage": 1, "precision": "fp32"},
        "zero2": {"plugin": "zero", "stage": 2, "precision": "fp32"},
        "hybrid0": {**HYBRID, "zero_stage": 0},
        "ddp": {"plugin": "ddp", "dtype": torch.float32},
        "fsdp2": {"plugin": "fsdp", "precision": "fp32"},
    }
    for result in run_ranks(2, outside_cases.each, outside_cases.groups_by_hand, configs):
        wrong = [(c, n, e) for c, errors in result.items() for n, e in errors.items() if not e <= GRADIENTS]
        assert not wrong


@pytest.mark.parametrize("write", outside_cases.WRITES)
def test_outside_written_weights_are_followed_on_one_process(write: str) -> None:
    """Writes through `data` change no version of the weight."""
    torch.manual_seed(0)
    module = torch.nn.Linear(7, 5, dtype=torch.bfloat16)
    params = list(module.parameters())
    base = torch.optim.AdamW(params, lr=outside_cases.LR, eps=outside_cases.EPS, weight_decay=0.0)
    optimizer = BlockOptimizer(base, list(module.named_parameters()), [["weight", "bias"]], verbose=0)
    books = {param: outside_cases.Textbook(param.detach().float()) for param in params}
    for step in range(4):
        for param in params:
            param.grad = outside_cases.gradient(str(param.dim()), tuple(param.shape), step).to(param.dtype)
            books[param].step(param.grad.double())
        optimizer.step()
        before = {param: param.detach().clone() for param in params}
        outside_cases.WRITES[write](module, params)
        for param, book in books.items():
            book.follow(before[param], param.detach())
    masters = optimizer.state_dict()["block"]["masters"]
    for name, param in module.named_parameters():
        torch.testing.assert_close(masters[name].double(), books[param].values, rtol=0, atol=ROUNDING)


def test_outside_consumed_gradients_are_said_once_on_one_process(caplog: pytest.LogCaptureFixture) -> None:
    for zero_grad in (True, False):
        module = torch.nn.Linear(3, 2)
        base = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizer = BlockOptimizer(base, list(module.named_parameters()), [["weight", "bias"]], verbose=0)
        caplog.clear()
        with caplog.at_level("INFO", logger="colossal_bcd"):
            for _ in range(3):
                module(torch.ones(3)).sum().backward()
                optimizer.step()
                if zero_grad:
                    optimizer.zero_grad()
        assert sum("uses gradients up" in message for message in caplog.messages) == int(not zero_grad)
