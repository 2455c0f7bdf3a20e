"""What ranks run in test_replicas.py: training on several processes without an engine, and the same on one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import colossal_bcd
from colossal_bcd import AdamW, BlockOptimizer, BlockOptimizerRatio, GaLoreSGD
from colossal_bcd.block import MomentumCorrection, OptimizerCorrection
from colossal_bcd.testing import CollectiveCounter

STEPS, PERIOD = 7, 2
KINDS = ("plain", "ddp", "ddp first", "ddp unused")
LR = 1e-2


class Layer(nn.Module):
    def __init__(self, lora: bool) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(5, 7), nn.Linear(7, 5, bias=False), nn.LayerNorm(5)
        self.lora_B = nn.Linear(5, 5, bias=False) if lora else None

    def forward(self, hidden: Tensor) -> Tensor:
        adapted = 0.0 if self.lora_B is None else self.lora_B(hidden)
        return self.norm(hidden + adapted + self.down(self.up(hidden).tanh()))


class Net(nn.Module):
    """Embedding, three layers, head; a batch whose first token is 0 leaves out the middle layer.

    With `lora` the layers have adapters, by name, and everything else is frozen, as by peft.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, lora: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 5)
        self.layers = nn.ModuleList(Layer(lora) for _ in range(3))
        self.lm_head = nn.Linear(5, 11, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        self.to(dtype)
        for name, param in self.named_parameters() if lora else ():
            param.requires_grad_("lora" in name)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            if index != 1 or tokens[0, 0] != 0:
                hidden = layer(hidden)
        logits = self.lm_head(hidden)
        return {"loss": logits.square().mean(), "logits": logits}


def batch(step: int, part: int) -> Tensor:
    return torch.randint(1, 11, (2, 4), generator=torch.Generator().manual_seed(100 * step + part))


def wrap(model: nn.Module, ratio: bool = False, **options: Any) -> Any:
    if ratio:
        options = {"switch_every": PERIOD, "lr": LR, "update_ratio": 0.3, "verbose": 0, **options}
        groups = [{"params": list(model.parameters())}]
        return BlockOptimizerRatio(groups, list(model.named_parameters()), preserve_threshold=8, **options)
    if options.get("correction") == "optimizer":
        options["correction"] = OptimizerCorrection(GaLoreSGD, rank=2, momentum=0.9)
    elif options.get("correction") == "momentum":
        options["correction"] = MomentumCorrection()
    base = AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    options = {"switch_block_every": PERIOD, "switch_mode": "ascending", "verbose": 0, **options}
    return BlockOptimizer(base, list(model.named_parameters()), **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): param.detach().clone() for name, param in model.named_parameters()}


@contextlib.contextmanager
def quiet(model: nn.Module, active: bool) -> Iterator[None]:
    """`no_sync` of a wrapper that has it, where it is wanted."""
    with model.no_sync() if active and hasattr(model, "no_sync") else contextlib.nullcontext():
        yield


def whole(
    world: int,
    optimizer_options: dict[str, Any],
    *,
    accumulate: int = 1,
    clip: float | None = None,
    miss: str = "",
    apart: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Weights after a loop on one process over the batches of all ranks, in one backward pass or in passes `apart`."""
    model = Net(**options)
    optimizer = wrap(model, **optimizer_options)
    for step in range(STEPS):
        losses = [
            model(batch_for(step, rank, micro, accumulate, miss))["loss"] / (world * accumulate)
            for rank in range(world)
            for micro in range(accumulate)
        ]
        for loss in losses if apart else [sum(losses)]:
            if loss.requires_grad:
                loss.backward()
        clip_gradients(model, optimizer, clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def batch_for(step: int, rank: int, micro: int, accumulate: int, miss: str) -> Tensor:
    """A micro-batch; the middle layer has no part in those that are to `miss` it: "some", "all", or none."""
    tokens = batch(step, rank * accumulate + micro)
    if miss == "all" or (miss == "some" and (rank + micro + step) % 2):
        tokens[0, 0] = 0
    return tokens


def clip_gradients(model: nn.Module, optimizer: Any, norm: float | None) -> None:
    if norm is not None and hasattr(optimizer, "clip_grad_norm_") and not optimizer.dense_gradients:
        optimizer.clip_grad_norm_(norm)
    elif norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), norm)


def wrapped(kind: str, options: dict[str, Any], **net: Any) -> tuple[nn.Module, BlockOptimizer]:
    """A model as it is trained and its optimizer, made in the order that the kind says."""
    model = Net(**net)
    if kind == "plain":
        return model, wrap(model, **options)
    if kind == "ddp first":
        outer = DistributedDataParallel(model)
        if options.get("ratio"):
            return outer, wrap(model, **options)  # scattered entries depend on names
        named = {key: [f"module.{prefix}" for prefix in options[key]] for key in {"active_modules"} & options.keys()}
        return outer, wrap(outer, **{**options, **named})
    if kind == "ddp unused":
        optimizer = wrap(model, **options)
        return DistributedDataParallel(model, find_unused_parameters=True), optimizer
    assert kind == "ddp"
    optimizer = wrap(model, **options)
    return DistributedDataParallel(model), optimizer


def train(
    kind: str,
    optimizer_options: dict[str, Any],
    *,
    accumulate: int = 1,
    clip: float | None = None,
    no_sync: bool = True,
    evaluate: bool = False,
    miss: str = "",
    **net: Any,
) -> dict[str, Any]:
    """Weights of this rank, and collectives per step, of which the first checks the replicas."""
    model, optimizer = wrapped(kind, optimizer_options, **net)
    rank, calls = dist.get_rank(), []
    for step in range(STEPS):
        with CollectiveCounter() as counter:
            for micro in range(accumulate):
                with quiet(model, no_sync and micro < accumulate - 1):
                    loss = model(batch_for(step, rank, micro, accumulate, miss))["loss"] / accumulate
                    if loss.requires_grad:
                        loss.backward()
            clip_gradients(model, optimizer, clip)
            optimizer.step()
            optimizer.zero_grad()
        calls.append(dict(counter.calls))
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(batch(99, 0))
            if rank == 0:
                model(batch(99, 1))
            model.train()
    return {"weights": weights(model), "calls": calls}


def many(cases: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[str, Any]:
    """Results of several calls of `train` in one start of ranks."""
    return {name: train(*args, **options) for name, (args, options) in cases.items()}


def low_precision(kinds: tuple[str, ...]) -> dict[str, Any]:
    """bfloat16 weights, whose masters are made of other weights than those that DDP then copies from rank 0."""
    seeds = {kind: dist.get_rank() if kind.startswith("ddp") else 0 for kind in kinds}
    return {kind: train(kind, {}, dtype=torch.bfloat16, seed=seed) for kind, seed in seeds.items()}


def refusals() -> dict[str, str]:
    """What is refused, and how, on this rank."""
    rank = dist.get_rank()
    alone = dist.new_group([0, 1])

    def first_step(model: nn.Module, optimizer: Any) -> None:
        model(batch(0, rank))["loss"].backward()
        optimizer.step()

    def plain(net: dict[str, Any] | None = None, **options: Any) -> None:
        model = Net(**(net or {}))
        first_step(model, wrap(model, **options))

    def ddp(prepare: Any = None, wrapper: dict[str, Any] | None = None, **options: Any) -> None:
        model = Net()
        optimizer = wrap(model, **options)
        outer = DistributedDataParallel(model, **(wrapper or {}))
        if prepare is not None:
            prepare(outer)
        first_step(outer, optimizer)

    def joined() -> None:
        model = Net()
        optimizer = wrap(model)
        outer = DistributedDataParallel(model)
        with outer.join():
            first_step(outer, optimizer)

    def drifting() -> None:
        model = Net()
        optimizer = wrap(model)
        for step in range(PERIOD):
            with torch.no_grad():
                model.layers[0].up.weight[0, 0] += rank * step
            model(batch(step, rank))["loss"].backward()
            optimizer.step()

    def sharded() -> None:
        model, mesh = Net(), init_device_mesh("cpu", (dist.get_world_size(),))
        for name, param in list(model.lm_head.named_parameters()):
            setattr(model.lm_head, name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Replicate()])))
        wrap(model, ratio=True)

    class DeepSpeedEngine(nn.Module):
        """Stands for DeepSpeed's, by its name."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, tokens: Tensor) -> Any:
            return self.module(tokens)

    DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"

    def deepspeed(ratio: bool) -> None:
        model = Net()
        optimizer = wrap(model, ratio=ratio)
        first_step(DeepSpeedEngine(model), optimizer)

    cases = {
        "weights": lambda: plain({"seed": rank}),
        "ratio weights": lambda: plain({"seed": rank}, ratio=True),
        "dtypes": lambda: plain({"dtype": (torch.float64, torch.float32)[rank]}),
        "blocks": lambda: plain(switch_block_every=PERIOD + rank),
        "a group that is none": lambda: plain(data_group="all"),
        "alone in a DDP": lambda: ddp(data_group=None),
        "static": lambda: ddp(wrapper={"static_graph": True}),
        "hook": lambda: ddp(lambda outer: outer.register_comm_hook(None, lambda state, bucket: bucket)),
        "another group": lambda: ddp(data_group=alone),
        "join": joined,
        "drift": drifting,
        "DTensor": sharded,
        "DeepSpeed": lambda: deepspeed(False),
        "ratio DeepSpeed": lambda: deepspeed(True),
    }
    errors = {}
    for name, case in cases.items():
        try:
            case()
            errors[name] = "nothing"
        except ValueError as error:
            errors[name] = str(error)
    return errors


def groups() -> dict[str, Tensor]:
    """Of three ranks the first two train replicas, the last one and a search of all train alone."""
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    results = {}
    for name, group in {"pair": single if dist.get_rank() == 2 else pair, "search": None}.items():
        model = Net()
        optimizer = wrap(model, data_group=group)
        for step in range(STEPS):
            model(batch(step, dist.get_rank()))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        results[name] = weights(model)
    return results


def plain_optimizers() -> dict[str, dict[str, Tensor]]:
    """Weights after steps of every optimizer of this package in torch's DDP, with other random numbers on each rank."""
    results = {}
    for name in colossal_bcd.__all__:
        made = getattr(colossal_bcd, name)
        if isinstance(made, type) and issubclass(made, torch.optim.Optimizer) and not name.startswith("Block"):
            model = Net(torch.float32)
            optimizer = optimizer_named(name, model)
            outer = DistributedDataParallel(model)
            torch.manual_seed(dist.get_rank())
            for step in range(STEPS):
                outer(batch(step, dist.get_rank()))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
            results[name] = weights(model)
    return results


def optimizer_named(name: str, model: nn.Module) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if "GoLore" in name or "GaLore" in name:
        matrices = [param for param in model.parameters() if param.dim() == 2]
        others = [param for param in model.parameters() if param.dim() != 2]
        groups = [{"params": matrices, "rank": 2, "update_proj_gap": 3}, {"params": others}]
    options: dict[str, Any] = {} if "Adafactor" in name else {"lr": 1e-3}
    if "GoLore" in name:
        options["random_from_step"] = 4
    return getattr(colossal_bcd, name)(groups, **options)


def scaled() -> dict[str, Any]:
    """Loss scaling, which skips the third step on both ranks though only one rank's loss is not finite."""
    model = Net()
    optimizer = wrap(model)
    outer, scaler = DistributedDataParallel(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in (0, 1, 99, *range(2, STEPS)):
        loss = outer(batch(step, dist.get_rank()))["loss"]
        scaler.scale(loss * (torch.inf if step == 99 and dist.get_rank() == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(outer.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return {"weights": weights(model), "steps": optimizer.num_steps}


def two_models() -> dict[str, Tensor]:
    """A model that was wrapped before, and two models with one loss."""
    first, second = Net(), Net(seed=1)
    kept = wrap(first, switch_block_every=5)
    outer = DistributedDataParallel(first)
    outer(batch(9, 0))["loss"].backward()
    outer.zero_grad()
    optimizers = [wrap(first), wrap(second)]
    outer = DistributedDataParallel(first)
    for step in range(STEPS):
        (outer(batch(step, dist.get_rank()))["loss"] + second(batch(step, dist.get_rank()))["loss"]).backward()
        for optimizer in optimizers:
            optimizer.step(lambda: torch.zeros(()))
            optimizer.zero_grad()
    del kept
    return weights(nn.ModuleList([first, second]))


def one_after_the_other() -> dict[str, Any]:
    return {
        "scaled": scaled(),
        "refusals": refusals(),
        "plain": plain_optimizers(),
        "two": two_models(),
        "low": low_precision(KINDS),
    }
