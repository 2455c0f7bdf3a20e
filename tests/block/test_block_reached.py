"""An active block that backward does not reach is said once, and an error where that is true of all blocks."""

from __future__ import annotations

import logging
from typing import Any

import graph_cases
import pytest
import torch
from graph_cases import LAYERS, PERIOD
from torch import nn

from colossal_bcd import BlockOptimizer, BlockOptimizerRatio


class Region(graph_cases.Net):
    """Some layers are computed without a graph, as a reentrant checkpoint of another library computes them."""

    def __init__(self, without: range, unused: bool = False) -> None:
        super().__init__()
        for index in without:
            self.layers[index].register_forward_hook(lambda _module, _args, output: output.detach())
        if unused:
            self.layers[0].spare = nn.Linear(2, 2)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("make", [graph_cases.block, graph_cases.ratio])
def test_reached_blocks_are_silent(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = graph_cases.Net()
    with caplog.at_level(logging.INFO, "colossal_bcd"):
        graph_cases.train(model, make(model))
    assert not [record for record in caplog.records if "reached" in record.name]


def test_reached_says_once_which_block_has_no_gradient(caplog: pytest.LogCaptureFixture) -> None:
    """An image tower, for example, whose blocks come first: later blocks train, so that this is no error."""
    model = Region(range(LAYERS - 1))
    optimizer = graph_cases.block(model, active_modules=["lm_head."])
    graph_cases.train(model, optimizer, 2 * PERIOD * LAYERS)
    (line,) = warnings_of(caplog)
    assert "step 0: none of the parameters of block layers.0 has a gradient" in line
    assert "checkpointing" in line


def test_reached_no_block_at_all_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """After every block has had its period, before anything else trains on."""
    model = Region(range(LAYERS))
    optimizer = graph_cases.block(model, active_modules=["lm_head."])
    graph_cases.train(model, optimizer, PERIOD * LAYERS - 1)
    with pytest.raises(ValueError, match=f"{LAYERS} blocks was active, and none got a gradient in any step"):
        graph_cases.train(model, optimizer, 1)
    assert len(warnings_of(caplog)) == 1


def test_reached_no_layer_of_the_ratio_form_is_an_error() -> None:
    model = Region(range(LAYERS))
    optimizer = graph_cases.ratio(model)
    assert isinstance(optimizer, BlockOptimizerRatio)
    graph_cases.train(model, optimizer, PERIOD - 1)
    with pytest.raises(ValueError, match=f"{LAYERS} layers was active, and none got a gradient in any step"):
        graph_cases.train(model, optimizer, 1)


def test_reached_unused_parameters_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Region(range(0), unused=True)
    optimizer: BlockOptimizer = graph_cases.block(model)
    with caplog.at_level(logging.INFO, "colossal_bcd"):
        graph_cases.train(model, optimizer, 2 * PERIOD * LAYERS)
    told = [record.message for record in caplog.records if "no gradient" in record.message]
    assert told == [
        "step 0: 2 of 7 parameters of block layers.0 have no gradient: layers.0.spare.weight, layers.0.spare.bias"
    ]


def test_reached_steps_without_any_backward_are_no_error() -> None:
    """As with torch: a step without gradients does nothing."""
    model = graph_cases.Net()
    before = graph_cases.weights(model)
    optimizer = graph_cases.block(model, active_modules=["lm_head."])
    for _ in range(2 * PERIOD * LAYERS):
        optimizer.step()
    assert all(map(torch.equal, graph_cases.weights(model), before))
