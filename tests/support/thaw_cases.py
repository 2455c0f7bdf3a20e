"""What ranks run in test_thaw.py: weights that are frozen, thawed, added or missed by a batch during training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from torch import Tensor, nn
from undivided import Undivided

import colossal_bcd
from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin

STEPS = 9
BATCH = 2
LR = 1e-2


HYBRID: dict[str, Any] = {"custom_policy": Undivided(), "tp_size": 1, "pp_size": 1, "precision": "fp32"}
PLUGINS: dict[str, Callable[[], Any]] = {
    "zero1": lambda: LowLevelZeroPlugin(stage=1, precision="fp32"),
    "zero1-no-overlap": lambda: LowLevelZeroPlugin(stage=1, precision="fp32", overlap_communication=False),
    "zero1-gather": lambda: LowLevelZeroPlugin(stage=1, precision="fp32", overlap_allgather=True),
    "zero2": lambda: LowLevelZeroPlugin(stage=2, precision="fp32"),
    "hybrid0": lambda: HybridParallelPlugin(zero_stage=0, **HYBRID),
    "hybrid1": lambda: HybridParallelPlugin(zero_stage=1, **HYBRID),
    "hybrid2": lambda: HybridParallelPlugin(zero_stage=2, **HYBRID),
}
"""Every engine; precision fp32 leaves the float64 of the model alone."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: colossal_bcd.AdamW(params, lr=LR, weight_decay=0.1),
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9, weight_decay=0.1),
    "torch Adagrad": lambda params: torch.optim.Adagrad(params, lr=LR, initial_accumulator_value=0.1),
    "Lamb": lambda params: colossal_bcd.Lamb(params, lr=LR, weight_decay=0.1),
    "CAME": lambda params: colossal_bcd.CAME(params, lr=LR, weight_decay=0.1),
}


class Net(nn.Module):
    """Two kinds of input: numbers of tokens, and of a picture, which a batch may lack."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.vision, self.head = nn.Embedding(11, 6), nn.Linear(7, 6), nn.Linear(6, 5, bias=False)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.double()
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator, dtype=param.dtype) / 2)

    def forward(self, tokens: Tensor, picture: Tensor | None = None) -> Tensor:
        hidden = self.embedding(tokens)
        if picture is not None:
            hidden = hidden + self.vision(picture)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return self.head(hidden).square().mean()


def batch(step: int, rank: int, seen: bool) -> tuple[Tensor, Tensor | None]:
    """[3] tokens and [3, 7] a picture, if the rank has one at this step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, 11, (3,), generator=generator)
    picture = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    return tokens, picture if seen else None


def thaw(model: nn.Module, optimizer: Any, step: int) -> None:
    """Frozen from the start, thawed, frozen and thawed again."""
    if step in (0, 5):
        model.layers[1].requires_grad_(False)
    if step in (3, 7):
        model.layers[1].requires_grad_(True)


def freeze(model: nn.Module, optimizer: Any, step: int) -> None:
    """Trained from the start, frozen and thawed again, weight by weight, and frozen for good."""
    if step in (2, 7):
        model.layers[1].requires_grad_(False)
    if step == 4:
        model.layers[1].weight.requires_grad_(True)
    if step == 5:
        model.layers[1].requires_grad_(True)


def _added(model: nn.Module, step: int) -> list[nn.Parameter]:
    if step == 0:
        model.layers[1].requires_grad_(False)
        model.vision.requires_grad_(False)
    added = {3: model.vision, 5: model.layers[1]}.get(step)
    return [] if added is None else list(added.requires_grad_(True).parameters())


def group(model: nn.Module, optimizer: Any, step: int) -> None:
    """Two groups that are added, one after the other."""
    if added := _added(model, step):
        optimizer.add_param_group({"params": added, "lr": LR / 2, "weight_decay": 0.0})


def inner(model: nn.Module, optimizer: Any, step: int) -> None:
    """The same around the wrapper."""
    group(model, getattr(optimizer, "optim", optimizer), step)


def append(model: nn.Module, optimizer: Any, step: int) -> None:
    """Weights put into the group that there is; on one process into another of equal hyper-parameters."""
    added = _added(model, step)
    if added and hasattr(optimizer, "optim"):
        optimizer.param_groups[0]["params"] += added
    elif added:
        optimizer.add_param_group({"params": added})


def frozen_group(model: nn.Module, optimizer: Any, step: int) -> None:
    """A group is added while it is frozen, and thawed later."""
    added = _added(model, step)
    if added:
        optimizer.add_param_group({"params": [param.requires_grad_(False) for param in added], "lr": LR / 2})
    if step == 7:
        model.layers[1].requires_grad_(True)


def vision_only(model: nn.Module, optimizer: Any, step: int) -> None:
    """Nothing trains but what a batch may lack."""
    if step == 0:
        model.requires_grad_(False).vision.requires_grad_(True)


def nothing(model: nn.Module, optimizer: Any, step: int) -> None:
    """Nothing changes."""


def first_step_of(event: Any, model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer is made of: everything, or what is not added later."""
    event(model, None, 0)
    later = event in (group, inner, append, frozen_group)
    return [param for param in model.parameters() if param.requires_grad or not later]


EVENTS: dict[str, tuple[Any, Any]] = {
    "thaw": (thaw, lambda step, rank: True),
    "freeze": (freeze, lambda step, rank: True),
    "group": (group, lambda step, rank: True),
    "inner": (inner, lambda step, rank: True),
    "append": (append, lambda step, rank: True),
    "frozen group": (frozen_group, lambda step, rank: True),
    "one rank's batch misses all that trains": (vision_only, lambda step, rank: rank == 0 or step % 3 != 0),
    "every rank's batch does": (vision_only, lambda step, rank: step % 3 != 0),
    "the other rank's, thawed": (thaw, lambda step, rank: rank == 1 or step < 4),
}
"""What happens before each step, and whether a rank has a picture at a step."""


@functools.cache
def one_process(optimizer: str, event: str, num_ranks: int, accumulate: int) -> list[Tensor]:
    """Weights after `STEPS` steps on all ranks' batches."""
    act, seen = EVENTS[event]
    model = Net()
    ours = OPTIMIZERS[optimizer](first_step_of(act, model))
    for step in range(STEPS):
        if step:
            act(model, ours, step)
        for rank in range(num_ranks):
            for micro in range(accumulate):
                number = step * accumulate + micro
                loss = model(*batch(number, rank, seen(number, rank)))
                if loss.requires_grad:
                    (loss / num_ranks / accumulate).backward()
        ours.step()
        ours.zero_grad()
    return [param.detach() for param in model.parameters()]


def boosted(plugin: str, optimizer: str, event: str, accumulate: int, no_sync: bool) -> list[Tensor]:
    """The same with each rank's batches under a plugin."""
    act, seen = EVENTS[event]
    plain = Net()
    ours = OPTIMIZERS[optimizer](first_step_of(act, plain))
    booster = Booster(plugin=PLUGINS[plugin]())
    model, engine, *_ = booster.boost(plain, ours)
    for step in range(STEPS):
        if step:
            act(plain, engine, step)
        for micro in range(accumulate):
            number = step * accumulate + micro
            waits = no_sync and (micro < accumulate - 1 or step % 2)
            with booster.no_sync(model, engine) if waits else contextlib.nullcontext():
                loss = model(*batch(number, dist.get_rank(), seen(number, dist.get_rank())))
                booster.backward(loss / accumulate, engine)
        engine.step()
        engine.zero_grad()
        assert all(param.grad is None for param in plain.parameters()), "a gradient stays after zero_grad"
    if hasattr(model, "_force_wait_all_gather"):
        model._force_wait_all_gather()
    return [param.detach() for param in plain.parameters()]


def table(plugin: str) -> dict[str, list[Tensor]]:
    """Weights of every optimizer through every event."""
    return {case: boosted(plugin, *row) for case, row in cases(plugin)}


def cases(plugin: str) -> Iterator[tuple[str, tuple[str, str, int, bool]]]:
    """Every optimizer through three events without accumulation, and few through others and under plugins that differ
    in how they send; one with accumulation, under no_sync where there is one.  "zero1-no-overlap" has all of them.
    """
    for event in EVENTS:
        all_of_them = plugin == "zero1-no-overlap" or (plugin == "zero1" and event in ("thaw", "group", "append"))
        for optimizer in OPTIMIZERS if all_of_them else ["SGD", "Lamb"]:
            if optimizer == "torch Adagrad" and EVENTS[event][0] in (group, inner, append, frozen_group):
                continue  # on one process torch's makes no state for groups that are added, and fails
            yield f"{event}, {optimizer}", (optimizer, event, 1, False)
        yield f"{event}, AdamW, accumulated", ("AdamW", event, 2, False)
        if not plugin.endswith("2"):
            yield f"{event}, AdamW, no_sync", ("AdamW", event, 2, True)


def blocks_miss(plugin: str) -> list[Tensor]:
    """Weights with the vision layer as one of two blocks; rank 1's batches have a picture at every third step."""
    engine_of = {**PLUGINS, "ddp": TorchDDPPlugin}
    plain = Net()
    optimizer = vision_blocks(plain)
    if plugin == "one process":
        for step in range(STEPS):
            for rank in range(2):
                loss = plain(*batch(step, rank, rank == 0 or step % 3 == 0))
                if loss.requires_grad:
                    (loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [param.detach() for param in plain.parameters()]
    booster = Booster(plugin=engine_of[plugin]())
    model, engine, *_ = booster.boost(plain, optimizer)
    for step in range(STEPS):
        rank = dist.get_rank()
        booster.backward(model(*batch(step, rank, rank == 0 or step % 3 == 0)), engine)
        engine.step()
        engine.zero_grad()
    return [param.detach() for param in plain.parameters()]


def vision_blocks(model: Net) -> BlockOptimizer:
    """The vision layer, then a layer that all batches use, in turn; nothing else trains."""
    chosen = [(name, param) for name, param in model.named_parameters() if name.split(".")[0] in ("vision", "layers")]
    return BlockOptimizer(
        OPTIMIZERS["AdamW"]([param for _, param in chosen]),
        chosen,
        block_prefix_list=[["vision."], ["layers.2."]],
        switch_block_every=3,
        switch_mode="ascending",
        verbose=0,
    )


def llama(
    event: str, num_ranks: int, options: dict[str, Any] | None = None, whole: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A Llama whose second layer and head are thawed or added after three steps.

    Args:
        event: "thaw" or "group".
        num_ranks: with batches of their own.
        options: of the HybridParallelPlugin; None: one process.
        whole: weights of one process.
    Returns:
        Weights of one process; under a plugin largest differences from them, of each weight that this rank has.
    """
    plain = models.llama()
    named = dict(plain.named_parameters())
    late = [param for name, param in named.items() if "layers.1." in name or "norm" in name or "lm_head" in name]
    for param in late:
        param.requires_grad_(False)
    start = [param for param in named.values() if event == "thaw" or param.requires_grad]
    ours = torch.optim.SGD(start, lr=0.05, momentum=0.9)
    booster, model, engine = None, plain, ours
    if options is not None:
        booster = Booster(plugin=HybridParallelPlugin(precision="fp32", **options))
        model, engine, *_ = booster.boost(plain, ours)
    for step in range(6):
        if step == 3:
            for param in late:
                param.requires_grad_(True)
            if event == "group":
                engine.add_param_group({"params": late, "lr": 0.02})
        if booster is None:
            for rank in range(num_ranks):
                (models.loss(plain, models.tokens(2 * step + rank, batch=BATCH)) / num_ranks).backward()
        else:
            _llama_pass(booster, model, engine, step)
        engine.step()
        engine.zero_grad()
    if booster is None:
        return {name: param.detach() for name, param in named.items()}
    parts = {}
    for name, param in named.items():
        if param in engine.model_layouts:  # else another pipeline stage has it
            layout = engine.model_layouts[param]
            got, want = (part.reshape(-1)[: layout.num_local] for part in (param.detach(), layout.shard(whole[name])))
            parts[name] = (got - want).abs().max()
    return parts


def _llama_pass(booster: Booster, model: Any, engine: Any, step: int) -> None:
    tokens = models.tokens(2 * step + dist.get_rank(booster.plugin.dp_group), batch=BATCH)
    if booster.plugin.pp_size == 1:
        booster.backward(models.loss(model, tokens), engine)
        return
    data = [{"input_ids": tokens, "labels": tokens}]
    booster.execute_pipeline(iter(data), model, lambda output, _: output.loss, engine, return_loss=True)
