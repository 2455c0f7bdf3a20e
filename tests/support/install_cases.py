"""What ranks run in test_install.py: ColossalAI's own plugins after `install()`, with gradients given."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import galore_references
import galore_torch
import models
import plugin_cases
import references
import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator, set_accelerator
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin, LowLevelZeroPlugin, hybrid_parallel_plugin
from colossalai.nn import optimizer as colossalai_optimizers
from colossalai.zero.low_level import LowLevelZeroOptimizer
from on_ranks import message_of
from torch import Tensor, nn
from transformers.optimization import Adafactor

from colossal_bcd import CAME, BlockOptimizer, Lamb, compat
from colossal_bcd import Adafactor as OurAdafactor
from colossal_bcd.booster import LowLevelZeroPlugin as OurLowLevelZeroPlugin
from colossal_bcd.booster import install
from colossal_bcd.booster.casts import registry
from colossal_bcd.booster.cpu_accelerator import HostAccelerator
from colossal_bcd.booster.layouts import shard_layouts
from colossal_bcd.booster.stock_plugins import distributed_class
from colossal_bcd.sharding import Layout
from colossal_bcd.testing import CollectiveCounter
from support.errors import largest_error

STEPS = plugin_cases.STEPS
GIVEN_LR = {"relative_step": False}
PROJECTION = {"rank": 3, "update_proj_gap": 2, "scale": 0.5, "svd_method": "random"}


def projected(groups: list[dict[str, Any]], **options: Any) -> Any:
    """galore_torch's Adafactor on projections; the keys of a group that it does not know it leaves to the cast."""
    return galore_torch.GaLoreAdafactor([{**group, **PROJECTION, "proj_type": "std"} for group in groups], **options)


OPTIMIZERS: dict[str, Any] = {
    "ours": (Lamb, references.lamb, {}, {}),
    "compat": (compat.DistributedLamb, references.lamb, {}, {"bias_correction": "step_size"}),
    "theirs": (colossalai_optimizers.Lamb, references.lamb, {}, {"bias_correction": False}),
    "theirs-distributed": (
        colossalai_optimizers.DistributedLamb, references.lamb, {}, {"bias_correction": "step_size"}
    ),
    "adafactor": (colossalai_optimizers.Adafactor, references.adafactor, GIVEN_LR, GIVEN_LR),
    "transformers-adafactor": (Adafactor, references.adafactor, GIVEN_LR, GIVEN_LR),
    "compat-adafactor": (compat.DistributedAdaFactor, references.adafactor, GIVEN_LR, GIVEN_LR),
    "came": (colossalai_optimizers.CAME, references.came, {"lr": 1.0}, {}),
    "galore-adafactor": (projected, galore_references.galore_adafactor, GIVEN_LR, {**GIVEN_LR, **PROJECTION}),
    "distributed-came": (colossalai_optimizers.DistributedCAME, references.came, {}, {}),
}  # fmt: skip
"""Class, the reference, and the hyper-parameters of either."""


def plugin_of(options: dict[str, Any]) -> Any:
    options = {"precision": "bf16", **options}
    if options.pop("plugin") == "zero":
        return LowLevelZeroPlugin(**options)
    return HybridParallelPlugin(**{"pp_size": 1, **options})


def injected(optimizer: str, kind: str, vocab: int, options: dict[str, Any]) -> dict[str, Any]:
    """Masters of this rank after `STEPS` steps on given gradients, against the float64 reference."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = _injected(optimizer, kind, vocab, options)
    return {**result, "warnings": [str(w.message) for w in caught if "lr_scheduler" in str(w.message)]}


def _injected(optimizer: str, kind: str, vocab: int, options: dict[str, Any]) -> dict[str, Any]:
    install()
    cls, reference, own, hyper = OPTIMIZERS[optimizer]
    model = plugin_cases.build(kind, vocab)
    if options.get("precision") != "fp32":
        model = model.bfloat16()
    names = {id(param): name for name, param in model.named_parameters()}
    full = {name: param.detach().double() for name, param in model.named_parameters()}
    base = cls(plugin_cases.groups(model), **own)
    order = [param for group in base.param_groups for param in group["params"]]
    decay = {names[id(param)]: group["weight_decay"] for group in base.param_groups for param in group["params"]}
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, plugin_cases.factor)
    plugin = plugin_of(options)
    # The booster destroys its process groups when it is collected.
    booster = Booster(plugin=plugin)
    model, engine, *_ = booster.boost(model, base)
    layouts = layouts_of(model, order, full, names, plugin)
    states: dict[str, dict[str, Any]] = {names[id(param)]: {"key": key} for key, param in enumerate(order)}
    largest_step = 0.0
    for step in range(STEPS):
        given = {name: plugin_cases.gradient(name, tuple(weight.shape), step) for name, weight in full.items()}
        calls = step_on(engine, {param: (layout, given[names[id(param)]]) for param, layout in layouts.items()})
        for name, grad in given.items():
            if grad is not None:
                weight = full[name]
                lr = plugin_cases.LR * (1.0 if weight.dim() > 1 else 0.5) * plugin_cases.factor(step)
                numbers = {"lr": lr, "weight_decay": decay[name], **hyper}
                full[name] = reference(weight, grad.double(), states[name], **numbers)
                largest_step = max(largest_step, (full[name] - weight).abs().max().item())
        scheduler.step()
    masters = [master for group in engine.optim.param_groups for master in group["params"]]
    error = 0.0
    for param, master in zip(filter(layouts.__contains__, order), masters, strict=True):
        want = part(layouts[param].shard(full[names[id(param)]]), master.numel(), plugin)
        error = max(error, largest_error(master.view(-1), want))
    largest = max(weight.abs().max().item() for weight in full.values())
    return {"error": error, "bound": plugin_cases.bound_of(largest, largest_step), "calls": calls}


def layouts_of(
    model: Any, order: list[Tensor], full: dict[str, Tensor], names: dict[int, str], plugin: Any
) -> dict[Tensor, Layout]:
    """By the rule that the plugins of this package use, checked against the shards that ColossalAI has made."""
    shapes = {id(param): tuple(full[names[id(param)]].shape) for param in order}
    rank = dist.get_rank(plugin.tp_group) if hasattr(plugin, "tp_group") else 0
    layouts = shard_layouts(model.unwrap(), shapes, rank, getattr(plugin, "tp_size", 1))
    for param, layout in layouts.items():
        shard = layout.shard(full[names[id(param)]]).view(-1)[: layout.num_local]
        assert torch.equal(param.detach().view(-1)[: layout.num_local].double(), shard)
    return layouts


def step_on(engine: Any, grads: dict[Tensor, tuple[Layout, Tensor | None]]) -> dict[str, int]:
    """One step; the collectives of the optimizer in it.

    The gradients come from a loss that is linear in the weights, so that the engine's own hooks see them.
    """
    terms = []
    for param, (layout, grad) in grads.items():
        if grad is not None:
            terms.append((param * layout.shard(grad).to(param.dtype)).sum())
    engine.backward(torch.stack(terms).sum())
    inner, counter = engine.optim.step, CollectiveCounter()

    def counted() -> None:
        with counter:
            inner()

    engine.optim.step = counted
    engine.step()
    engine.optim.step = inner
    engine.zero_grad()
    return dict(counter.calls)


def part(shard: Tensor, length: int, plugin: Any) -> Tensor:
    """[length] what a master holds of a shard: all of it, or this data-parallel rank's part; zeros beyond the end."""
    rank = dist.get_rank(getattr(plugin, "dp_group", None)) if length < shard.numel() else 0
    values = shard.reshape(-1)[rank * length : (rank + 1) * length]
    return torch.nn.functional.pad(values, (0, length - values.numel()))


def refused(what: str) -> str:
    """The error of a stock plugin on what it cannot run."""
    install()
    model = models.llama().bfloat16()
    optimizer: Any = Lamb(model.parameters())
    options: dict[str, Any] = {"plugin": "hybrid", "tp_size": 1, "zero_stage": 1}
    if what == "pipeline":
        options |= {"pp_size": 2, "zero_stage": 0, "num_microbatches": 1}
    elif what == "sequence":
        options |= {"sp_size": 2, "enable_sequence_parallelism": True, "sequence_parallelism_mode": "all_to_all"}
    elif what == "block":
        optimizer = BlockOptimizer(torch.optim.AdamW(model.parameters()), list(model.named_parameters()))
        options = {"plugin": "zero", "stage": 1}
    elif what == "lars":
        optimizer = colossalai_optimizers.Lars(model.parameters(), lr=1e-3)
    booster = Booster(plugin=plugin_of(options))
    return message_of(lambda: booster.boost(model, optimizer))


def without_install() -> dict[str, Any]:
    """The stock plugin replaces the parameters of our optimizer without binding it; only the CPU is prepared here."""
    set_accelerator(HostAccelerator())
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
    before = colossalai_optimizers.cast_to_distributed
    model = models.llama().bfloat16()
    booster = Booster(plugin=LowLevelZeroPlugin(stage=1, precision="bf16", overlap_communication=False))
    model, engine, *_ = booster.boost(model, Lamb(model.parameters()))
    batch = models.tokens(0)
    engine.backward(model(input_ids=batch, labels=batch).loss)
    try:
        engine.step()
        error = "nothing was raised"
    except ValueError as raised:
        error = str(raised)
    table = colossalai_optimizers.optim2DistOptim
    return {
        "error": error,
        "function": before.__module__,
        "plugin": hybrid_parallel_plugin.cast_to_distributed is before,
        "table": table[colossalai_optimizers.Lamb] is colossalai_optimizers.DistributedLamb and Lamb not in table,
    }


def installed_twice() -> dict[str, bool]:
    """What install() has replaced, after one call and after two."""
    snapshots = []
    for _ in range(2):
        install()
        snapshots.append(
            [
                dict(colossalai_optimizers.optim2DistOptim),
                colossalai_optimizers.cast_to_distributed,
                hybrid_parallel_plugin.cast_to_distributed,
                LowLevelZeroOptimizer._sanity_checks,
                get_accelerator(),
            ]
        )
    return {"same": snapshots[0] == snapshots[1], "none": colossalai_optimizers.cast_to_distributed(None) is None}


def table_entries() -> dict[str, Any]:
    """ColossalAI's table, read by those who look classes up in it."""
    install()
    stock, table = colossalai_optimizers, colossalai_optimizers.optim2DistOptim
    sources = {
        compat.DistributedLamb: (stock.Lamb, stock.DistributedLamb),
        compat.DistributedAdaFactor: (stock.Adafactor, stock.DistributedAdaFactor),
        compat.DistributedCAME: (stock.CAME, stock.DistributedCAME),
    }
    found: dict[str, Any] = {}
    for kind, classes in sources.items():
        for cls in classes:
            options = {"relative_step": False} if kind is compat.DistributedAdaFactor else {"lr": 1.0}
            theirs = cls([{"params": [nn.Parameter(torch.ones(2, 3))], "lr": 0.25}], **options)
            ours = table[cls](theirs.param_groups)
            found[cls.__name__] = isinstance(ours, kind), ours.param_groups[0]["lr"], hasattr(ours, "setup_distributed")
    # Its own call of the table; ColossalAI's classes cannot be constructed with bitsandbytes 0.50.
    args = SimpleNamespace(optim_bits=8, min_8bit_size=17, percentile_clipping=100, block_wise=True)
    for cls in (stock.GaLoreAdamW8bit, stock.DistGaloreAwamW):
        ours = table[cls]([{"params": [nn.Parameter(torch.ones(2, 3))], "lr": 0.25, "rank": 2}], args=args)
        assert ours.param_groups[0]["min_8bit_size"] == 17
        kind = isinstance(ours, compat.DistGaloreAwamW)
        found[cls.__name__] = kind, ours.param_groups[0]["lr"], hasattr(ours, "setup_distributed")
    ours_of = (
        *sources,
        Lamb,
        OurAdafactor,
        CAME,
        compat.DistGaloreAwamW,
        *(each.cls for each in registry.OPTIMIZERS.values()),
    )
    return {**found, "ours": all(table[cls] is distributed_class(cls) for cls in ours_of)}


def train(name: str, plugin: str) -> list[float]:
    """Losses of a model under the stock plugin after install(), or under this package's."""
    if plugin == "stock":
        install()
    make = LowLevelZeroPlugin if plugin == "stock" else OurLowLevelZeroPlugin
    model = models.llama().bfloat16()
    booster = Booster(plugin=make(stage=2, precision="bf16", max_norm=1.0))
    model, engine, *_ = booster.boost(model, OPTIMIZERS[name][0](model.parameters(), lr=1e-2))
    losses = []
    for step in range(4):
        batch = models.tokens(2 * step + dist.get_rank())
        loss = model(input_ids=batch, labels=batch).loss
        booster.backward(loss, engine)
        engine.step()
        engine.zero_grad()
        losses.append(loss.item())
    return losses
