"""The documentation's code runs."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from colossal_bcd.optim import ShardedOptimizer, State, StateSpec
from colossal_bcd.optim.options import require
from colossal_bcd.sharding import Layout, Rounds, ShardView


def test_added_optimizer_of_the_walkthrough_trains():
    text = (Path(__file__).parent.parent / "docs" / "add_an_optimizer.md").read_text()
    names = {
        name: value
        for name, value in globals().items()
        if value in (ShardedOptimizer, StateSpec, State, require, Layout, Rounds, ShardView, dataclass)
    }
    names |= {"__name__": __name__}
    for block in re.findall(r"```python\n(@dataclass.*?|def .*?|class .*?)```", text, re.DOTALL):
        exec(block, names)
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = names["ScaledSGD"]([weight], lr=0.1)
    weight.grad = torch.tensor([0.0, 2.0])
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([3.0, 3.5]))
    weights = [torch.nn.Parameter(torch.tensor([3.0, 4.0]) * scale) for scale in (1, 2)]
    optimizer = names["ScaledSGD"](weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.tensor([0.0, 2.0])
    optimizer.step()
    assert torch.allclose(torch.stack(list(weights)), torch.tensor([[3.0, 3.5], [6.0, 7.0]]))


def test_galore_page_makes_an_optimizer_that_trains():
    text = (Path(__file__).parent.parent / "docs" / "galore.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    model, optimizer = names["model"], names["optimizer"]
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.arange(8)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    bases = ["left" in state or "right" in state for state in optimizer.state.values()]
    assert bases == [True, True, False, False, False]
