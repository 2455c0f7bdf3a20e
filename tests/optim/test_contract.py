"""Optimizers of other packages: every class is right as base of blocks, or refused by name."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from block_net import Net, tokens, train, weights, wrap
from foreign_optimizers import CLASSES, UNAVAILABLE, make, verdict

from colossal_bcd import BlockOptimizer
from colossal_bcd.optim.foreign.contract import Contract, examine

LAYERS, PERIOD, STEPS = 3, 2, 7
"""Blocks 0, 1, 2, and the first step of block 0 again."""
BUILT = [name for name in CLASSES if name not in UNAVAILABLE]


def net() -> Net:
    return Net(layers=LAYERS, width=5)


@functools.cache
def contract_of(name: str) -> Contract:
    return examine(make(name, net()))


def blocks(name: str, model: Net) -> BlockOptimizer:
    return wrap(model, make(name, model), verbose=0, switch_block_every=PERIOD)


def plain(name: str) -> list[torch.Tensor]:
    """A loop that makes a new optimizer over each layer when its turn comes."""
    model = net().requires_grad_(False)
    torch.manual_seed(0)
    for step in range(STEPS):
        layer = model.layers[step // PERIOD % LAYERS]
        if step % PERIOD == 0:
            model.layers.requires_grad_(False)
            layer.requires_grad_(True)
            optimizer = make(name, layer)
        model(tokens(step)).backward()
        optimizer.step()
        for param in layer.parameters():
            param.grad = None
    return weights(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BUILT)
def test_every_base_of_blocks_equals_a_new_optimizer_per_block_or_is_refused_by_name(name: str) -> None:
    """Counts in param groups went on over a switch: the first step after it was 0.0052 instead of 0.0100."""
    contract, model = contract_of(name), net()
    is_cast = name.startswith("colossalai")
    if (contract.misfit is not None and not is_cast) or name == "torch.optim.LBFGS":
        with pytest.raises(ValueError, match=rf"{CLASSES[name].__name__}.* expected "):
            blocks(name, model)
        assert all(param.requires_grad for param in model.parameters()), "refused before anything is changed"
        return
    optimizer = blocks(name, model)
    if contract.misfit is not None:  # ColossalAI's, which plugins cast to others
        with pytest.raises(ValueError, match=f"base_optimizer: got colossalai's {CLASSES[name].__name__}.* expected "):
            train(model, optimizer, 1)
        return
    torch.manual_seed(0)
    train(model, optimizer, 3)
    random = torch.get_rng_state()
    state, half = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, STEPS - 3, start=3)
    want = plain(name)
    for got, expected in zip(weights(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    resumed = net()
    again = blocks(name, resumed)
    resumed.load_state_dict(half)
    again.load_state_dict(state)
    torch.set_rng_state(random)
    train(resumed, again, STEPS - 3, start=3)
    for got, expected in zip(weights(resumed), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_table_of_the_docs_is_what_is_measured() -> None:
    """A new class, or a new verdict about an old one, has to be written there."""
    page = Path(__file__).parents[2] / "docs" / "base_optimizers.md"
    rows = re.findall(r"^\| `([\w.]+)` \| ([\w ]+) \| (.*) \|$", page.read_text(), re.MULTILINE)
    said = {f"{package}.{cls}": where for package, where, classes in rows for cls in classes.split(", ")}
    assert said == {name: verdict(name, net()) for name in BUILT}
