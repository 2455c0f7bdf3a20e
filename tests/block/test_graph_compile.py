"""Models compiled by torch train every block, with one compilation for each set of active parameters."""

from __future__ import annotations

import functools
import gc
from typing import Any

import graph_cases
import pytest
import torch
import torch._dynamo
from graph_cases import LAYERS, PERIOD

STEPS = PERIOD * LAYERS * 2  # two passes over all blocks


@functools.cache
def eager(optimizer: str) -> list[torch.Tensor]:
    model, made = graph_cases.prepared(optimizer, "none")
    graph_cases.train(model, made, STEPS)
    return graph_cases.weights(model)


@pytest.fixture(autouse=True)
def fresh_graphs() -> Any:
    """No graphs, counts or limits of other tests."""
    config: Any = torch._dynamo.config
    before = config.cache_size_limit, config.accumulated_cache_size_limit
    # torch's own: blocks that other tests have made in a process that compiles have raised them.
    config.cache_size_limit, config.accumulated_cache_size_limit = 8, 256
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    config.cache_size_limit, config.accumulated_cache_size_limit = before
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compiled_run(optimizer: str, how: str, backend: Any = "aot_eager") -> torch.nn.Module:
    """A model after training; its graphs are counted from here."""
    model = graph_cases.net("none")
    if optimizer.startswith("lora"):
        model = graph_cases.with_adapters(model)
    given = graph_cases.compiled_before(how, model, backend)
    made = graph_cases.OPTIMIZERS[optimizer](given)
    graph_cases.train(graph_cases.compiled_after(how, given, backend), made, STEPS)
    return model


@pytest.mark.parametrize(
    ("optimizer", "how"), [*(("block", how) for how in graph_cases.COMPILED), ("block_head", "ran_before")]
)
def test_compiled_blocks_train_as_in_eager_mode(optimizer: str, how: str) -> None:
    model = compiled_run(optimizer, how)
    assert all(map(torch.equal, graph_cases.weights(model), eager(optimizer)))
    # Compiled alone, a layer is frozen, or trains, or has a gradient to hand on: three graphs for all of them.
    expected = {"layers": 3, "ran_before": LAYERS + 1}
    assert num_graphs() == expected.get(how, LAYERS)


NUM_GRAPHS = {
    # Everything trains in the first graph, later a block with all adapters; "all" corrects what does not train.
    "block_corrected": 1,
    "ratio": 2,
    "sparse": 2,
    "lora_all": 1 + LAYERS,
}


@pytest.mark.parametrize("optimizer", NUM_GRAPHS)
def test_compiled_models_train_as_in_eager_mode_with_every_optimizer(optimizer: str) -> None:
    model = compiled_run(optimizer, "ran_before")
    assert all(map(torch.equal, graph_cases.weights(model), eager(optimizer)))
    assert num_graphs() == NUM_GRAPHS[optimizer]


def test_compiled_blocks_have_as_many_graphs_as_they_need() -> None:
    """More blocks than torch keeps graphs of one function unless it is told to."""
    torch._dynamo.config.cache_size_limit = 2
    layers = 4
    model = graph_cases.Net(layers=layers)
    compiled = torch.compile(model, backend="eager")
    optimizer = graph_cases.block(compiled, switch_block_every=1)
    graph_cases.train(compiled, optimizer, layers)
    assert num_graphs() == layers
    graph_cases.train(compiled, optimizer, layers)
    assert num_graphs() == layers


def test_compiled_blocks_of_a_frozen_heap() -> None:
    """Modules are found after gc.freeze, too, which stays in force."""
    model = graph_cases.Net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = graph_cases.block(compiled)
    gc.freeze()
    try:
        graph_cases.train(compiled, optimizer, STEPS)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert all(map(torch.equal, graph_cases.weights(model), eager("block")))


def test_compiled_blocks_where_guards_know_modules_by_identity() -> None:
    config: Any = torch._dynamo.config
    with config.patch(inline_inbuilt_nn_modules=False):
        model = compiled_run("block", "before")
    assert all(map(torch.equal, graph_cases.weights(model), eager("block")))


def test_compiled_names_are_those_of_the_model() -> None:
    """Prefixes may name the wrapper or not; a state goes from a compiled run to one that is not."""
    plain, given = graph_cases.Net(), graph_cases.Net()
    compiled = torch.compile(given, backend="aot_eager")
    prefixes = [["layers.0."], ["_orig_mod.layers.1.up"], ["layers.1.down"]]
    optimizer = graph_cases.block(compiled, block_prefix_list=prefixes, active_modules=["_orig_mod.lm_head."])
    names = ["layers.0.", "layers.1.up", "layers.1.down"]
    other = graph_cases.block(plain, block_prefix_list=[[name] for name in names], active_modules=["lm_head."])
    assert optimizer.identity() == other.identity()
    graph_cases.train(compiled, optimizer, PERIOD + 1)
    plain.load_state_dict(given.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for model, made in ((compiled, optimizer), (plain, other)):
        graph_cases.train(model, made, PERIOD)
    assert all(map(torch.equal, graph_cases.weights(plain), graph_cases.weights(given)))


def test_what_was_not_frozen_on_the_heap_is_not_afterwards() -> None:
    """All that lived when a block was switched was put aside with it, and what is there is never collected."""
    gc.collect()
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        model = graph_cases.Net()
        compiled = torch.compile(model, backend="aot_eager")
        graph_cases.train(compiled, graph_cases.block(compiled), STEPS)
        assert gc.get_freeze_count() <= before
    finally:
        gc.unfreeze()
