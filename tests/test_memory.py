"""The estimate of memory against bytes that are counted, and what it says of shards, blocks and corrections."""

from __future__ import annotations

from typing import Any

import memory_cases
import pytest
import torch
from block_net import Net, adamw, tokens, train, wrap
from memory_cases import MAKE
from torch import Tensor

import colossal_bcd
from colossal_bcd import GaLoreSGD, estimate
from colossal_bcd.block import MomentumCorrection, OptimizerCorrection
from colossal_bcd.testing import PeakBytes, live_bytes, run_ranks


def state_bytes(optimizer: Any) -> int:
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


@pytest.mark.parametrize("name", MAKE)
def test_estimate_of_state_is_what_the_first_step_allocates(name: str) -> None:
    model = Net(width=64)
    optimizer = MAKE[name](model)
    guess = estimate(optimizer)
    train(model, optimizer, 1)
    assert guess.state == state_bytes(optimizer) > 0
    assert guess.masters == 0, "whole float32 weights are their own masters"
    assert guess.gradients == guess.step_gradients == sum(param.nbytes for param in model.parameters())


def test_estimate_allocates_nothing_and_needs_no_data() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(8192, 8192, bias=False)
        optimizer = colossal_bcd.CAME(model.parameters(), lr=1e-3)
    with PeakBytes() as alive:
        guess = estimate(optimizer, num_shards=8, partition_grad=True)
    assert alive.peak < 4096
    n = 8192 * 8192 // 8
    # Rows and columns of two statistics: each rank has the rows that it holds, and all columns.
    assert guess.state == pytest.approx(4 * n + 2 * 4 * (1024 + 8192), rel=1e-3)
    assert (guess.masters, guess.gradients) == (4 * n, 4 * n)


def test_estimate_of_blocks_is_that_of_the_largest() -> None:
    model = Net(dtype=torch.bfloat16, width=64)
    blocks = [["layers.0"], ["layers.1", "layers.2"]]
    optimizer = wrap(model, block_prefix_list=blocks)
    guess, n = estimate(optimizer), 2 * (64 * 64 + 64)
    assert (guess.masters, guess.gradients, guess.step_gradients) == (4 * n, 2 * n, 4 * n)
    assert guess.state == 8 * n + 4 * 4, "torch's step is a tensor"
    before = live_bytes()
    train(model, optimizer, 3)
    assert live_bytes() - before == pytest.approx(guess.between_steps - guess.masters // 2, abs=1024)


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_estimate_counts_gradients_that_wait(accumulation_steps: int) -> None:
    """Two bytes for every value that is corrected, measured between two micro-batches."""
    model = Net(dtype=torch.bfloat16, width=64)
    optimizer = wrap(model, switch_mode="fixed", sgd_mode="all", accumulation_steps=accumulation_steps)
    guess = estimate(optimizer)
    corrected = sum(optimizer.named_parameters[name].numel() for name in optimizer.corrected_names())
    assert guess.waiting == (2 * corrected if accumulation_steps > 1 else 0)
    before = live_bytes()
    model(tokens(0)).backward()
    waiting = live_bytes() - before
    # Gradients that no Python object holds yet are not among the live tensors.
    assert waiting == pytest.approx(guess.waiting, abs=512)
    assert guess.gradients == sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)


@pytest.mark.parametrize(
    "rule", [MomentumCorrection(), OptimizerCorrection(GaLoreSGD, rank=2, momentum=0.9)], ids=["momentum", "galore"]
)
def test_estimate_counts_the_state_of_corrections(rule: Any) -> None:
    model = Net(dtype=torch.bfloat16, width=64)
    optimizer = wrap(model, sgd_mode="all", correction=rule)
    guess = estimate(optimizer)
    train(model, optimizer, 6)
    states = optimizer.corrector.state.values()
    assert guess.correction_state == sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("bits", [8, 16])
def test_estimate_counts_residuals(bits: int) -> None:
    model = Net(dtype=torch.bfloat16, width=64)
    optimizer = wrap(model, residual="keep", residual_bits=bits)
    train(model, optimizer, 8)
    assert estimate(optimizer).residuals == sum(r.nbytes for r in optimizer.active_set.residuals.of.values()) > 0


@pytest.mark.parametrize("case", memory_cases.CASES)
def test_estimate_of_a_boosted_optimizer_is_what_it_holds(case: str) -> None:
    """Between steps every byte beyond the weights is in it, on every rank; no step needs more than it says."""
    for held, guess in run_ranks(memory_cases.CASES[case][0], memory_cases.held, case):
        assert held["masters"] == guess["masters"]
        assert held["between_steps"] == pytest.approx(guess["between_steps"], abs=8192)
        assert held["in_step"] <= guess["in_step"] + 8192


def test_estimate_refuses_state_that_it_cannot_place() -> None:
    model = Net()
    with pytest.raises(ValueError, match="state 'row_var' of Adafactor has shape .* Use an optimizer of this package"):
        estimate(torch.optim.Adafactor(model.parameters()))


def test_estimate_reads_as_a_table() -> None:
    lines = str(estimate(adamw(Net()))).splitlines()
    assert lines[1].split() == ["state", "0.0", "MiB"]
    assert [line[:17].strip() for line in lines[-3:]] == ["between steps", "after backward", "in step"]
