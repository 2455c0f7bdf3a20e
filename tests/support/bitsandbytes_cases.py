"""What ranks run in test_bitsandbytes.py: every optimizer of bitsandbytes on given gradients, against itself alone."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from on_ranks import gradient, heard, message_of
from outside_cases import placed
from torch import Tensor, nn
from undivided import Undivided

from colossal_bcd import BlockOptimizer
from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin
from colossal_bcd.sharding.dtensor import local_values
from support.errors import largest_error

LR = 1e-2
PERIOD = 2
STEPS = 5
"""Blocks switch twice."""
SAVED = 3
"""After how many steps a checkpoint is written: in the middle of the second block's two."""
HYBRID = {"pp_size": 1, "precision": "fp32", "zero_stage": 0}
MESHES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1, "precision": "fp32"},
    "zero2": {"stage": 2, "precision": "fp32"},
    "zero1-bf16": {"stage": 1, "precision": "bf16"},
    "zero2-low": {"stage": 2, "precision": "bf16", "master_weights": False},
    "hybrid0": {"tp_size": 1, **HYBRID},
    "hybrid1": {"tp_size": 1, **HYBRID, "precision": "bf16", "zero_stage": 1},
    "tp2": {"tp_size": 2, **HYBRID},
    "fsdp2": {"precision": "fp32"},
    "fsdp2-rows": {"precision": "fp32"},
    "zero1-rows": {"stage": 1, "precision": "fp32"},
}


def names() -> list[str]:
    """Every optimizer that bitsandbytes exports."""
    found = inspect.getmembers(bitsandbytes.optim, inspect.isclass)
    return [name for name, cls in found if issubclass(cls, torch.optim.Optimizer)]


def make(name: str, params: Any, **options: Any) -> Any:
    cls = getattr(bitsandbytes.optim, name)
    known = inspect.signature(cls).parameters
    given = {"lr": LR, "momentum": 0.9, "weight_decay": 0.1, "t_alpha": 4, "t_beta3": 4, **options}
    return cls(params, **{key: value for key, value in given.items() if key in known})


class Net(nn.Module):
    """Matrices of odd shapes, above and below the size from which state has 8 bits, a vector and single values.

    Of `square` a half is below that size; that of `wide` begins in the middle of a quantisation chunk.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wide = nn.Linear(131, 67)
        self.square = nn.Linear(65, 64, bias=False)
        self.small = nn.Linear(5, 1)
        self.last = nn.Linear(127, 33)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))


class Rows(nn.Module):
    """Matrices whose rows are whole quantisation chunks; neither two nor three ranks divide the rows evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.last = nn.Linear(256, 67, bias=False), nn.Linear(512, 35, bias=False)


def net_of(mesh: str) -> nn.Module:
    model = models.llama() if mesh == "tp2" else Rows() if mesh.endswith("rows") else Net()
    return model.bfloat16() if MESHES[mesh]["precision"] == "bf16" else model


BLOCKS = [["wide."], ["square.", "small."], ["last."]]


def clean() -> Any:
    """The table of overrides of this process, empty."""
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    return manager


def by_weight(model: nn.Module, manager: Any) -> None:
    manager.override_config(model.square.weight, "optim_bits", 32)
    manager.override_config(model.last.weight, key_value_dict={"lr": 3 * LR, "optim_bits": 8})
    manager.override_config(model.small.weight, "min_8bit_size", 1)


def by_module(model: nn.Module, manager: Any) -> None:
    manager.register_module_override(model.square, "weight", {"optim_bits": 32})
    manager.register_module_override(model.last, "weight", {"lr": 3 * LR, "optim_bits": 8})


def by_place(model: nn.Module, manager: Any) -> None:
    by_weight(model, manager)
    manager.register_parameters(model.parameters())
    manager.pid2config.clear()


OVERRIDES: dict[str, Callable[[nn.Module, Any], None]] = {
    "weight": by_weight,
    "module": by_module,
    "place": by_place,
}


class Alone:
    """The original package on one process: a plain optimizer, or a new one for every block."""

    def __init__(self, name: str, model: nn.Module, blocks: bool, override: str | None = None, **options: Any) -> None:
        self.name, self.model, self.blocks, self.options = name, model, blocks, options
        manager = clean()
        if override is not None:
            # A new optimizer for every block has the weights at other places.
            OVERRIDES["weight" if blocks else override](model, manager)
        self.optimizer = None if blocks else make(name, list(model.parameters()), **options)

    def step(self, step: int) -> None:
        named = dict(self.model.named_parameters())
        if self.blocks:
            prefixes = tuple(BLOCKS[step // PERIOD % len(BLOCKS)])
            named = {name: param for name, param in named.items() if name.startswith(prefixes)}
            if step % PERIOD == 0:
                self.optimizer = make(self.name, list(named.values()), **self.options)
        for name, param in named.items():
            param.grad = gradient(name, tuple(param.shape), step).to(param.dtype)
        self.optimizer.step()


class Boosted:
    """Under a plugin, with the weights of `Net`, or of a Llama where tensor parallelism divides them."""

    def __init__(self, name: str, mesh: str, blocks: bool, override: str | None = None, **options: Any) -> None:
        manager = clean()
        settings, model = MESHES[mesh], net_of(mesh)
        base = self.base(name, model, **options)
        if override is not None:
            OVERRIDES[override](model, manager)
        made = base
        if blocks:
            made = block_optimizer(base, model)
        plugin = LowLevelZeroPlugin if "stage" in settings else HybridParallelPlugin
        self.is_fsdp = mesh.startswith("fsdp2")
        if self.is_fsdp:
            plugin = FSDP2Plugin
        if isinstance(model, Net) and plugin is HybridParallelPlugin:
            settings = {**settings, "custom_policy": Undivided()}
        self.booster = Booster(plugin=plugin(**settings))
        self.model, self.engine, *_ = self.booster.boost(model, made)
        self.names = {id(param): key for key, param in self.model.unwrap().named_parameters()}
        self.layouts = (self.engine.engine if self.is_fsdp else self.engine).layouts

    def base(self, name: str, model: nn.Module, **options: Any) -> Any:
        return make(name, list(model.parameters()), **options)

    def step(self, step: int) -> None:
        for param in self.engine.masters.of:
            layout = self.layouts[param]
            grad = gradient(self.names[id(param)], layout.shape, step)
            param.grad = placed(layout.shard(grad).to(param.dtype), param, layout)
        if self.is_fsdp:
            self.engine.step()
            self.engine.zero_grad()
            return
        self.engine.sync_dp_grads()
        self.engine.load_gradients()
        self.engine.optim.step()
        self.engine.write_back()
        self.engine.zero_grad()
        if isinstance(self.engine.optim, BlockOptimizer):
            self.engine.optim.switch_if_due()


def block_optimizer(base: Any, model: nn.Module) -> BlockOptimizer:
    return BlockOptimizer(
        base,
        list(model.named_parameters()),
        BLOCKS,
        switch_block_every=PERIOD,
        switch_mode="ascending",
        verbose=0,
    )


def reference(mesh: str) -> nn.Module:
    return net_of(mesh) if mesh.endswith("low") else net_of(mesh).float()


def difference(name: str, mesh: str, blocks: bool, override: str | None = None, **options: Any) -> dict[str, float]:
    """The largest difference of each weight from the original package on one process, after each of `STEPS` steps."""
    run = Boosted(name, mesh, blocks, override, **options)
    for step in range(STEPS):
        run.step(step)
    model = reference(mesh)
    alone = Alone(name, model, blocks, override, **options)
    for step in range(STEPS):
        alone.step(step)
    wanted = dict(model.named_parameters())
    worst: dict[str, float] = {}
    for param in run.engine.layouts:
        key, layout = run.names[id(param)], run.engine.layouts[param]
        got = run.engine.masters.of.get(param)
        if got is None:
            got, part = param.detach(), layout
        else:
            part = run.engine.masters.layout(param)
        want = part.shard(wanted[key].detach()).view(-1)[: part.num_local].double()
        worst[key] = largest_error(got.detach().view(-1)[: part.num_local].double(), want)
    return worst


def walk(mesh: str, blocks: bool, chosen: list[str]) -> dict[str, Any]:
    """Of each optimizer its differences, or the text of its refusal; and what was warned of."""
    found: dict[str, Any] = {}
    for name in chosen:
        with heard(logging.WARNING) as warned:
            try:
                found[name] = difference(name, mesh, blocks), warned
            except ValueError as error:
                found[name] = str(error), []
    return found


def overridden(mesh: str, blocks: bool, override: str, chosen: list[str]) -> dict[str, dict[str, float]]:
    """`difference` with overrides of single weights."""
    return {name: difference(name, mesh, blocks, override) for name in chosen}


def bits(run: Boosted) -> dict[str, dict[str, Any]]:
    """Every tensor and number of this rank's state, by weight, without padding; masters, too."""
    optimizer = run.engine.optim
    base = getattr(optimizer, "base_optimizer", optimizer)
    found = {}
    for param, master in run.engine.masters.of.items():
        count = run.engine.masters.layout(param).num_local

        def data(value: Any, size: int = master.numel(), count: int = count) -> Any:
            if isinstance(value, Tensor) and size and value.numel() % size == 0:
                value = value.reshape(-1, size)[:, :count]
            return value.clone() if isinstance(value, Tensor) else value

        state = {key: data(value) for key, value in base.state[master].items()}
        found[run.names[id(param)]] = {"master": data(master.detach()), **state}
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal bit for bit, in types, dtypes and shapes, too."""
    if type(one) is not type(other) or (hasattr(one, "keys") and one.keys() != other.keys()):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))


def saves(mesh: str, blocks: bool, chosen: list[str], folder: str) -> dict[str, bool | str]:
    """Save in the middle of a block, load into a new run, and go on: whether all is as without, bit for bit."""
    found: dict[str, bool | str] = {}
    for name in chosen:
        run = Boosted(name, mesh, blocks)
        for step in range(SAVED):
            run.step(step)
        path = str(Path(folder, name))
        run.booster.save_optimizer(run.engine, path, shard=True)
        dist.barrier()
        whole = run.engine.state_dict()
        before = bits(run)
        found[name] = True
        for source in (path, whole):
            again = Boosted(name, mesh, blocks)
            again.engine.model.load_state_dict(run.engine.model.state_dict())
            again.engine.update_master_params(again.model)
            if isinstance(source, str):
                again.booster.load_optimizer(again.engine, source)
            else:
                again.engine.load_state_dict(source)
            found[name] &= same(bits(again), before)
            _tables_are_shared(again)
            if source is whole:
                for step in range(SAVED, STEPS):
                    again.step(step)
        for step in range(SAVED, STEPS):
            run.step(step)
        found[name] &= same(bits(again), bits(run))
    return found


def _tables_are_shared(run: Boosted) -> None:
    base = getattr(run.engine.optim, "base_optimizer", run.engine.optim)
    for state in base.state.values():
        for key, kind in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
            assert key not in state or state[key] is base.name2qmap[kind]


def goes_on(mesh: str, blocks: bool, chosen: list[str], folder: str) -> dict[str, dict[str, float] | str]:
    """Load what another mesh has saved and go on: the differences from one process, or the text of a refusal."""
    found: dict[str, dict[str, float] | str] = {}
    for name in chosen:
        model = reference(mesh)
        alone = Alone(name, model, blocks)
        for step in range(SAVED):
            alone.step(step)
        run = Boosted(name, mesh, blocks)
        # Weights of other blocks have been trained before; the active ones come from the masters in the file.
        with torch.no_grad():
            for param, layout in run.layouts.items():
                want = dict(model.named_parameters())[run.names[id(param)]]
                part = local_values(param).view(-1)
                part.copy_(layout.shard(want.detach()).view(-1)[: part.numel()])
        run.engine.update_master_params(run.model)
        try:
            run.booster.load_optimizer(run.engine, str(Path(folder, name)))
        except ValueError as error:
            found[name] = str(error)
            continue
        for step in range(SAVED, STEPS):
            run.step(step)
            alone.step(step)
        wanted = {key: param.detach() for key, param in model.named_parameters()}
        found[name] = {
            run.names[id(param)]: largest_error(
                local_values(param).view(-1),
                layout.shard(wanted[run.names[id(param)]]).view(-1)[: local_values(param).numel()],
            )
            for param, layout in run.layouts.items()
        }
    return found


def limited() -> str:
    manager = clean()
    model = Net()
    base = make("Adam", list(model.parameters()))
    manager.override_config(model.square.weight, "max_unorm", 0.5)
    return message_of(lambda: Booster(plugin=LowLevelZeroPlugin(**MESHES["zero1"])).boost(model, base))


def load_tensor_parallel(path: str) -> str:
    """Of a Llama that two tensor-parallel ranks have saved, on one rank."""
    clean()
    model = models.llama()
    booster = Booster(plugin=LowLevelZeroPlugin(**MESHES["zero1"]))
    model, engine, *_ = booster.boost(model, make("Adam8bit", list(model.parameters())))
    return message_of(lambda: booster.load_optimizer(engine, path))
