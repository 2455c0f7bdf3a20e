"""What ranks run in test_contract_plugins.py: every optimizer of other packages under the plugins."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from block_net import Net, tokens, wrap
from colossalai.booster import Booster
from foreign_optimizers import make, verdict
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW
from undivided import Undivided

from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossal_bcd.booster.casts.registry import cast
from colossal_bcd.checkpoint import CheckpointError
from colossal_bcd.fsdp.weights import WholeTensors
from colossal_bcd.optim.foreign.contract import examine
from support.errors import largest_error

LAYERS, PERIOD = 3, 2
STEPS = {False: 3, True: 4}
"""Of a plain optimizer, and in blocks, of which each has two."""
FILE = "optimizer.pt"
Resumed: TypeAlias = Literal["file", "state dict"] | None
CASES: dict[tuple[str, bool], Resumed] = {
    ("zero1", False): "state dict",
    ("zero2", True): "file",
    ("hybrid0", False): None,
    ("hybrid0", True): None,
    # Without blocks torch's DDP steps the user's optimizer as it is.
    ("ddp", True): "file",
    ("fsdp2", False): "file",
    ("fsdp2", True): "state dict",
}
"""Plugin and whether in blocks -> by what the last step is repeated in new objects."""


PLUGINS: dict[str, Any] = {
    "zero1": lambda: LowLevelZeroPlugin(stage=1, precision="fp32"),
    "zero2": lambda: LowLevelZeroPlugin(stage=2, precision="fp32"),
    "hybrid0": lambda: HybridParallelPlugin(
        tp_size=1, pp_size=1, zero_stage=0, precision="fp32", custom_policy=Undivided()
    ),
    "ddp": TorchDDPPlugin,
    "fsdp2": lambda: FSDP2Plugin(precision="fp32"),
}


def optimizer_of(name: str, model: Net, in_blocks: bool) -> Any:
    base = make(name, model)
    return wrap(model, base, verbose=0, switch_block_every=PERIOD) if in_blocks else base


def expected(name: str, in_blocks: bool, becomes: Callable[[Any], Any] | None = None) -> list[Tensor]:
    """Weights of one process that averages the ranks' gradients; blocks by a new optimizer for each.

    What a plugin casts is stepped as what it becomes.
    """
    becomes = becomes or functools.partial(cast, measured=True)
    model = Net(layers=LAYERS, width=5)
    optimizer = None if in_blocks else becomes(make(name, model))
    for step in range(STEPS[in_blocks]):
        if in_blocks and step % PERIOD == 0:
            layer = model.layers[step // PERIOD % LAYERS]
            model.requires_grad_(False)
            optimizer = becomes(make(name, layer.requires_grad_(True)))
        grads = []
        for rank in range(dist.get_world_size()):
            model.zero_grad()
            model(tokens(10 * step + rank)).backward()
            grads.append([param.grad for param in model.parameters()])
        for param, *parts in zip(model.parameters(), *grads, strict=True):
            param.grad = None if parts[0] is None else sum(parts) / len(parts)
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def train(booster: Booster, model: Any, optimizer: Any, steps: Iterable[int]) -> None:
    for step in steps:
        booster.backward(model(tokens(10 * step + dist.get_rank())), optimizer)
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model: Any) -> dict[str, Tensor]:
    """Whole weights by name; all of the model's state."""
    whole = WholeTensors(model.unwrap().state_dict())
    return {name: whole[name].clone() for name in whole}


def outcome(name: str, booster: Booster, in_blocks: bool, resumed: Resumed) -> tuple[str, Any]:
    """("refused", the message), or ("errors", the largest of weights after the steps, and a resume).

    Where state is of a kind that files do not hold, ("unsaved", (those errors, the message)).
    """
    model = Net(layers=LAYERS, width=5)
    try:
        model, optimizer, *_ = booster.boost(model, optimizer_of(name, model, in_blocks))
    except ValueError as error:
        return "refused", str(error)
    total = STEPS[in_blocks]
    train(booster, model, optimizer, range(total - 1))
    weights, saved = weights_of(model), None
    unsaved = None
    try:
        if resumed == "file":
            booster.save_optimizer(optimizer, FILE)
        elif resumed == "state dict":
            saved = copy.deepcopy(optimizer.state_dict())
    except CheckpointError as error:
        unsaved, resumed = str(error), None
    train(booster, model, optimizer, [total - 1])
    want = expected(name, in_blocks)
    errors = [largest_error(list(weights_of(model).values()), want)]
    if resumed is not None:
        model = Net(layers=LAYERS, width=5)
        model.load_state_dict(weights)
        model, optimizer, *_ = booster.boost(model, optimizer_of(name, model, in_blocks))
        if resumed == "file":
            booster.load_optimizer(optimizer, FILE)
        else:
            optimizer.load_state_dict(saved)
        train(booster, model, optimizer, [total - 1])
        errors.append(largest_error(list(weights_of(model).values()), want))
    return ("errors", errors) if unsaved is None else ("unsaved", (errors, unsaved))


def redundant() -> list[str]:
    """What boosting and wrapping say about torch's own sharded optimizer."""
    said = []
    for in_blocks in (False, True):
        model = Net(layers=LAYERS, width=5)
        base: Any = ZeroRedundancyOptimizer(model.parameters(), AdamW, lr=1e-2)
        try:
            if in_blocks:
                wrap(model, base)
            else:
                Booster(plugin=PLUGINS["zero1"]()).boost(model, base)
        except ValueError as error:
            said.append(str(error))
    return said


def outcomes(names: list[str], folder: str) -> dict[tuple[str, str, bool], tuple[str, Any]]:
    """Of every optimizer in every case, in one process group; the ranks start in the folder."""
    os.chdir(folder)
    boosters = {plugin: Booster(plugin=build()) for plugin, build in PLUGINS.items()}
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            # Checkpoints of state of other kinds have tests of their own.
            simple = verdict(name, Net(layers=LAYERS, width=5)) == "everywhere" and not name.startswith("bitsandbytes")
            simple = simple and not examine(make(name, Net(layers=LAYERS, width=5))).shares_state
            for (plugin, in_blocks), way in CASES.items():
                resumed = way if simple else None
                results[name, plugin, in_blocks] = outcome(name, boosters[plugin], in_blocks, resumed)
    return results
