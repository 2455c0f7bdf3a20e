"""What ranks run in test_state_kinds.py: an optimizer of another package that keeps state of every kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytorch_optimizer
import torch
import torch.distributed as dist
from bitsandbytes_cases import BLOCKS, PERIOD, SAVED, STEPS, Boosted, Net, block_optimizer, gradient, same
from torch import Tensor, nn

from colossal_bcd.fsdp.weights import WholeTensors
from support.errors import largest_error

BOUND = 2**-18
"""Of weights up to 4, whose steps are up to 2^-1: kernels round sums of ten tensors in another order where a slice ends
their vectors elsewhere, by 2^-21 of a step at most.  A state that is lost changes the next step by 1e-2."""
GROUP: dict[str, Any] = {
    "schedule": ((1, (2.5, "x")), [4, (5, None)]),
    "nothing": None,
    "dict": {1: (2,), "x": {"y": [1, (True,)]}},
    "bounds": (math.inf, -math.inf),
    "shape": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "table": torch.arange(6, dtype=torch.bfloat16).view(2, 3) / 7,
    "rate": torch.tensor(1 / 3, dtype=torch.float64),
    "single": numpy.float32(1 / 3),
    "integer": numpy.int64(3),
    "array": numpy.arange(6, dtype=numpy.int16).reshape(2, 3),
    "complex": 1 + 2j,
}


class EveryKind(torch.optim.Optimizer):
    """Momentum that every kind of state takes part in.

    Args:
        params: as torch's.
        part: also keep what no other part of the weight has.
    """

    def __init__(self, params: Any, lr: float = 1e-2, part: bool = False) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, (0.5, 0.25)), **GROUP})
        self.part = part

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if "k" not in self.state:
            self.state["k"] = torch.tensor([0])
            self.state[("a", 1)] = {"loss": [0.5, (1, None)], 3: numpy.float32(0.1)}
        self.state["k"] += 1
        for group in self.param_groups:
            group["betas"] = (group["betas"][0], (group["betas"][1][0] * 0.99, group["betas"][1][1]))
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, self.state[param])

    def _update(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state.update(
                count=torch.tensor(0, dtype=torch.int32),
                seen=torch.zeros(1, dtype=torch.float64),
                window=torch.zeros(3, dtype=torch.float64),
                none=torch.empty(0),
                double=torch.zeros_like(param, dtype=torch.float64),
                low=torch.zeros_like(param, dtype=torch.bfloat16),
                mask=torch.zeros_like(param, dtype=torch.bool),
                pair=torch.zeros(2, *param.shape),
                grid=torch.zeros(2, 3, *param.shape),
                listed=[torch.zeros_like(param), {"square": torch.zeros_like(param)}, (1, "x")],
                text="text",
                nested=(1, (2.5, None), [True, (3,)]),
                number=numpy.float32(0),
                nan=math.nan,
            )
            if self.part:
                state["part"] = torch.zeros(param.numel() // 2)
        (beta, (first, _)), grad = group["betas"], param.grad
        state["count"] += 1
        state["seen"] += 1 / 3
        state["window"][int(state["count"]) % 3] = float(state["seen"])
        state["double"].mul_(beta).add_(grad)
        state["low"].copy_(torch.maximum(state["low"] / 2, grad.to(torch.bfloat16)))
        state["mask"] |= grad > 0
        state["pair"].mul_(first).add_(grad)
        state["grid"][1, 2].add_(grad)
        state["listed"][0].add_(grad)
        state["listed"][1]["square"].addcmul_(grad, grad)
        state["nested"] = (state["nested"][0] + 1, *state["nested"][1:])
        state["number"] = numpy.float32(state["number"] + numpy.float32(0.1))
        if self.part:
            state["part"] += param.reshape(-1)[0]
        counts = float(self.state["k"]) + float(state["number"]) + state["nested"][0] + float(state["window"].sum())
        sum_ = state["pair"].sum(0) + state["grid"].sum((0, 1)) + state["low"] + state["mask"] + state["listed"][0]
        param.sub_((state["double"] + sum_).to(param.dtype), alpha=group["lr"] * float(group["rate"]) / counts)


OPTIMIZERS: dict[str, Any] = {
    "every": EveryKind,
    "part": lambda params: EveryKind(params, part=True),
    "madgrad": lambda params: pytorch_optimizer.MADGRAD(params, lr=1e-2),
}
MESHES = [("zero1", False), ("zero2", True), ("hybrid0", True), ("zero1-bf16", False), ("fsdp2", True)]
CASES = [
    (name, mesh, blocks)
    for name in OPTIMIZERS
    for mesh, blocks in MESHES
    # What it keeps of a part follows from no other part, so that plugins that divide weights refuse it.
    if name != "part" or mesh == "hybrid0"
]


class Run(Boosted):
    """Two param groups of `Net`."""

    def base(self, name: str, model: nn.Module, **options: Any) -> Any:
        return optimizer_of(name, model)

    def kept(self) -> dict[Any, Any]:
        """State and param groups of this rank without padding, by weight."""
        optimizer = self.engine.optim
        optimizer = getattr(optimizer, "base_optimizer", optimizer)
        found: dict[Any, Any] = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
        for param, master in self.engine.masters.of.items():
            layout = self.engine.masters.layout(param)
            found[self.names[id(param)]] = without_padding(optimizer.state[master], master.numel(), layout.num_local)
            found[f"{self.names[id(param)]} master"] = without_padding(
                master.detach(), master.numel(), layout.num_local
            )
        found["groups"] = groups_of(optimizer)
        return found


def optimizer_of(name: str, model: nn.Module) -> Any:
    vectors = [param for param in model.parameters() if param.dim() == 1]
    return OPTIMIZERS[name]([{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": vectors}])


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def without_padding(value: Any, size: int, count: int) -> Any:
    if isinstance(value, Tensor):
        has_padding = size and value.numel() and not value.numel() % size
        return value.reshape(-1, size)[:, :count].clone() if has_padding else value.clone()
    if isinstance(value, dict):
        return {key: without_padding(item, size, count) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_padding(item, size, count) for item in value)
    return value


def equal(one: Any, other: Any) -> bool:
    """`same`, of numpy's arrays and dicts, too."""
    if isinstance(one, numpy.ndarray):
        return type(other) is type(one) and one.dtype == other.dtype and one.tolist() == other.tolist()
    if isinstance(one, Mapping):
        return (
            type(one) is type(other) and one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return same(one, other)


def resumed(name: str, mesh: str, blocks: bool, source: Any, model: nn.Module) -> Run:
    """A new run with the weights of a model and the optimizer of a folder, a file or a state dict."""
    run = Run(name, mesh, blocks)
    with torch.no_grad():
        ours = dict(run.model.unwrap().named_parameters())
        for key, saved in model.named_parameters():
            ours[key].copy_(saved)
    run.engine.update_master_params(run.model)
    if isinstance(source, str):
        run.booster.load_optimizer(run.engine, source)
    else:
        run.engine.load_state_dict(source)
    return run


def saves(folder: str) -> dict[str, bool]:
    """Save on every mesh in the middle of a block, load on the same one, and go on."""
    found = {}
    for name, mesh, blocks in CASES:
        run = Run(name, mesh, blocks)
        for step in range(SAVED):
            run.step(step)
        path = Path(folder, f"{name} {mesh}")
        run.booster.save_optimizer(run.engine, str(path), shard=True)
        run.booster.save_optimizer(run.engine, f"{path}.bin")
        whole = WholeTensors(run.model.unwrap().state_dict())
        weights = {key: whole[key] for key in whole}
        if dist.get_rank() == 0:
            torch.save(weights, f"{path}.model")
        dist.barrier()
        again = [
            resumed(name, mesh, blocks, source, run.model.unwrap())
            for source in (str(path), f"{path}.bin", run.engine.state_dict())
        ]
        kept = run.kept()
        alike = [equal(each.kept(), kept) for each in again]
        for step in range(SAVED, STEPS):
            for each in (run, *again):
                each.step(step)
        found[f"{name} {mesh}"] = all(alike) and all(equal(each.kept(), run.kept()) for each in again)
    return found


def loads(folder: str) -> dict[str, str]:
    """Load on one mesh what each has saved, and go on: "", what differs from a run on one process, or a refusal."""
    found = {}
    for name, mesh, blocks in CASES:
        alone = Alone(name, blocks, torch.bfloat16 if mesh.endswith("bf16") else torch.float32)
        for step in range(SAVED):
            alone.step(step)
        model = Net()
        model.load_state_dict(torch.load(Path(folder, f"{name} {mesh}.model"), weights_only=True))
        on = "zero1-bf16" if mesh.endswith("bf16") else "zero1"
        try:
            run = resumed(name, on, blocks, str(Path(folder, f"{name} {mesh}")), model)
        except ValueError as error:
            found[f"{name} {mesh}"] = str(error)
            continue
        for step in range(SAVED, STEPS):
            alone.step(step)
            run.step(step)
        found[f"{name} {mesh}"] = alone.differs(run)
    return found


class Alone:
    """One process without any of this package's checkpoints; a new optimizer for every block."""

    def __init__(self, name: str, blocks: bool, dtype: torch.dtype) -> None:
        self.name, self.blocks, self.model = name, blocks, Net().to(dtype).float()
        self.optimizer = None if blocks else optimizer_of(name, self.model)

    def step(self, step: int) -> None:
        named = dict(self.model.named_parameters())
        if self.blocks:
            named = {key: p for key, p in named.items() if key.startswith(tuple(BLOCKS[step // PERIOD % len(BLOCKS)]))}
            if step % PERIOD == 0:
                # A switch begins counts in groups and state without a parameter anew, too.
                fresh = optimizer_of(self.name, self.model)
                for group in fresh.param_groups:
                    group["params"] = [p for p in group["params"] if any(p is mine for mine in named.values())]
                self.optimizer = fresh
        for name, param in named.items():
            param.grad = gradient(name, tuple(param.shape), step)
        self.optimizer.step()

    def differs(self, run: Run) -> str:
        """Name of a weight or of a state that is another on a rank."""
        optimizer = getattr(run.engine.optim, "base_optimizer", run.engine.optim)
        if not equal(groups_of(optimizer), groups_of(self.optimizer)):
            return "groups"
        named = dict(self.model.named_parameters())
        for param, master in run.engine.masters.of.items():
            name, layout = run.names[id(param)], run.engine.masters.layout(param)
            if not largest_error(layout.shard(named[name].detach()), master.detach()) <= BOUND:
                return name
            state, want = optimizer.state[master], self.optimizer.state[named[name]]
            if state.keys() != want.keys():
                return f"{name} {sorted(state.keys() ^ want.keys())}"
            for key, value in want.items():
                if not isinstance(value, Tensor) and key != "listed" and not equal(value, state[key]):
                    return f"{name} {key}"
                if isinstance(value, Tensor) and (
                    value.dtype != state[key].dtype or value.dim() > state[key].dim() + 1
                ):
                    return f"{name} {key}"
        shared = [{key: value for key, value in each.state.items() if not isinstance(key, Tensor)} for each in (
            optimizer, self.optimizer
        )]  # fmt: skip
        return "" if equal(*shared) else "shared"


def blocks_of_one_process(name: str) -> tuple[Net, Any]:
    model = Net()
    return model, block_optimizer(optimizer_of(name, model), model)
