"""What ranks run in test_thaw.py: ranks that differ in what they thaw or add, and what cannot follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin as StockHybridParallelPlugin
from colossalai.booster.plugin import LowLevelZeroPlugin as StockLowLevelZeroPlugin
from colossalai.booster.plugin import TorchDDPPlugin as StockTorchDDPPlugin
from on_ranks import message_of
from thaw_cases import HYBRID, LR, OPTIMIZERS, PLUGINS, Net, batch, first_step_of, group
from torch import Tensor, nn

from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import TorchDDPPlugin, install
from colossal_bcd.testing import CollectiveCounter


def _change(event: str, head: nn.Linear, model: Any, engine: Any, booster: Booster) -> None:
    for step in range(3):
        if step == 1:
            head.requires_grad_(event != "frozen")
        if step == 1 and event == "added":
            engine.add_param_group({"params": head.parameters()})
        tokens, picture = batch(step, dist.get_rank(), seen=True)
        assert picture is not None
        booster.backward(model(tokens, picture.to(head.weight.dtype)), engine)
        engine.step()
        engine.zero_grad()


def differing(plugin: str) -> dict[str, str]:
    """The error that this rank gets where ranks differ in what they thaw or add."""
    rank = dist.get_rank()

    def thawed_on(ranks: dict[int, int], trained: bool = True) -> Callable[[], None]:
        def run() -> None:
            plain = Net().requires_grad_(False)
            plain.head.requires_grad_(trained)
            booster = Booster(plugin=PLUGINS[plugin]())
            model, engine, *_ = booster.boost(plain, OPTIMIZERS["Lamb"](plain.parameters()))
            for step in range(4):
                if step == 1 and rank in ranks:
                    plain.layers[ranks[rank]].requires_grad_(True)
                _advance(model, engine, booster, step)

        return run

    def added_on_one() -> None:
        plain = Net()
        booster = Booster(plugin=PLUGINS[plugin]())
        model, engine, *_ = booster.boost(plain, OPTIMIZERS["AdamW"](plain.layers.parameters()))
        for step in range(4):
            if step == 1 and rank == 0:
                engine.add_param_group({"params": plain.head.parameters()})
            _advance(model, engine, booster, step)

    def saved() -> None:
        plain = Net()
        plain.head.requires_grad_(False)
        booster = Booster(plugin=PLUGINS[plugin]())
        _, engine, *_ = booster.boost(plain, OPTIMIZERS["AdamW"](plain.parameters()))
        plain.head.requires_grad_(rank == 0)
        engine.state_dict()

    return {
        "thawed on one rank": message_of(thawed_on({1: 1})),
        "the first to be trained, on one rank": message_of(thawed_on({0: 1}, trained=False)),
        "others": message_of(thawed_on({0: 1, 1: 2})),
        "added on one rank": message_of(added_on_one),
        "before a checkpoint": message_of(saved),
        "the same": message_of(thawed_on({0: 1, 1: 1})),
    }


def _advance(model: Any, engine: Any, booster: Booster, step: int) -> None:
    booster.backward(model(*batch(step, dist.get_rank(), seen=True)), engine)
    engine.step()
    engine.zero_grad()


def collectives(plugin: str) -> dict[str, Any]:
    """Calls of each step, in which a layer is thawed at the third; of a run in which it was trained from the start."""
    counts: dict[str, Any] = {}
    for late in (True, False):
        plain = Net()
        plain.layers[1].requires_grad_(not late)
        booster = Booster(plugin=PLUGINS[plugin]())
        model, engine, *_ = booster.boost(plain, OPTIMIZERS["AdamW"](plain.parameters()))
        calls = []
        for step in range(5):
            if step == 2:
                plain.layers[1].requires_grad_(True)
            with CollectiveCounter() as counter:
                _advance(model, engine, booster, step)
            calls.append(dict(counter.calls))
        counts["late" if late else "from the start"] = calls
    return counts


def resumed(plugin: str, folder: str) -> list[float]:
    """Largest differences between going on and being loaded into a new run that thaws and adds the same."""
    straight: list[Tensor] = []
    errors = []
    for load in (False, True):
        plain = Net()
        ours = OPTIMIZERS["AdamW"](first_step_of(group, plain))
        booster = Booster(plugin=PLUGINS[plugin]())
        model, engine, *_ = booster.boost(plain, ours)
        for step in range(1, 10):
            group(plain, engine, step)
            if load and step < 8:
                continue
            if step == 8:
                if load:
                    booster.load_model(model, f"{folder}/model")
                    booster.load_optimizer(engine, f"{folder}/optimizer")
                else:
                    booster.save_model(model, f"{folder}/model", shard=True)
                    booster.save_optimizer(engine, f"{folder}/optimizer", shard=True)
            _advance(model, engine, booster, step)
        if load:
            errors = [(a - b).abs().max().item() for a, b in zip(straight, plain.parameters(), strict=True)]
        straight = [param.detach() for param in plain.parameters()]
    return errors


def refusals() -> dict[str, str]:
    """What cannot follow says so."""
    found = {}
    booster = Booster(plugin=PLUGINS["zero1"]())
    plain = Net()
    plain.head.requires_grad_(False)
    model, engine, *_ = booster.boost(plain, OPTIMIZERS["AdamW"](plain.parameters()))
    found["in a group"] = message_of(lambda: engine.add_param_group({"params": plain.vision.weight}))
    found["frozen in a group"] = message_of(lambda: engine.add_param_group({"params": plain.head.parameters()}))
    found["not in the model"] = message_of(lambda: engine.add_param_group({"params": nn.Linear(2, 2).parameters()}))
    engine.optim.add_param_group({"params": list(nn.Linear(2, 2).parameters())})
    found["not in the model, inner"] = message_of(lambda: _advance(model, engine, booster, 0))
    for where in ("wrapper", "inner", "base"):
        booster = Booster(plugin=PLUGINS["zero1"]())
        plain = Net()
        blocks = BlockOptimizer(
            OPTIMIZERS["AdamW"](plain.layers.parameters()), list(plain.layers.named_parameters()), verbose=0
        )
        model, engine, *_ = booster.boost(plain, blocks)
        target = {"wrapper": engine, "inner": engine.optim, "base": engine.optim.base_optimizer}[where]

        head = list(plain.head.parameters())
        found[f"blocks, {where}"] = message_of(partial(_add, target, head, model, engine, booster))
    return found


def _add(target: Any, params: list[nn.Parameter], model: Any, engine: Any, booster: Booster) -> None:
    target.add_param_group({"params": params})
    _advance(model, engine, booster, 0)


def other_engines() -> dict[str, str]:
    """Errors of torch's DDP and of ColossalAI's own plugins about what they cannot train."""
    install()
    makers = {
        "ddp": lambda: TorchDDPPlugin(find_unused_parameters=True),
        "stock ddp": lambda: StockTorchDDPPlugin(find_unused_parameters=True),
        "stock zero": lambda: StockLowLevelZeroPlugin(stage=1, precision="fp32"),
        "stock hybrid": lambda: StockHybridParallelPlugin(**{**HYBRID, "zero_stage": 1, "precision": "bf16"}),
    }
    found = {}
    for name, make in makers.items():
        for event in ("thawed", "added", "frozen"):
            plain = Net().float() if "stock" in name else Net()
            plain.head.requires_grad_(event == "frozen")
            params = plain.parameters() if event != "added" else plain.layers.parameters()
            booster = Booster(plugin=make())
            model, engine, *_ = booster.boost(plain, torch.optim.AdamW(params, lr=LR))

            found[f"{name}, {event}"] = message_of(partial(_change, event, plain.head, model, engine, booster))
    return found
