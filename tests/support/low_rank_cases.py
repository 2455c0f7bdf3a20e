"""What ranks run in test_low_rank.py: GaLore under the real plugins, reducing images or whole gradients."""

from __future__ import annotations

import math
import zlib
from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from on_ranks import equal_on_ranks
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from colossal_bcd import BlockOptimizer, GaLoreAdamW
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, LowRankOptions, TorchDDPPlugin
from colossal_bcd.low_rank import GaLoreSGD
from colossal_bcd.testing import CollectiveCounter, storages
from support.errors import largest_error

GAP = 4
RANK = 8
MAX_NORM = 1e-2
PLUGINS = {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin, "ddp": TorchDDPPlugin}


class Net(nn.Module):
    """Computes in float64 from end to end, which a Llama is not: its norms and its loss are float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, 24)
        shapes = [(33, 24), (24, 33), (16, 24), (64, 16), (24, 64), (9, 24)]
        self.layers = nn.ModuleList([nn.Linear(c, r) for r, c in shapes] + [nn.Conv1d(9, 8, 3)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x.transpose(1, 2)).square().mean()


def net_loss(model: Any, batch: Tensor) -> Tensor:
    return model(batch) if isinstance(model.unwrap(), Net) else models.loss(model, batch)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for name, param in model.named_parameters() if param.dim() >= 2 and "layers" in name]


def boosted(
    plugin: str,
    options: dict[str, Any],
    hyper: dict[str, Any],
    *,
    dtype: torch.dtype,
    only: bool = False,
    block: int = 0,
    net: bool = False,
) -> tuple[Any, Any, Booster]:
    """A small Llama with GaLore on the matrices of its layers; with `only`, nothing else is trained."""
    model = (Net() if net else models.llama(layers=2)).to(dtype)
    projected = matrices(model)
    others = [param for param in model.parameters() if all(param is not other for other in projected)]
    for param in others:
        param.requires_grad_(not only)
    hyper = {"rank": RANK, "update_proj_gap": GAP, **hyper}
    inner = {"adamw": GaLoreAdamW, "sgd": GaLoreSGD}[hyper.pop("inner", "adamw")]
    groups: list[dict[str, Any]] = [{"params": projected, **hyper}]
    optimizer: Any = inner(groups + ([] if only else [{"params": others}]), lr=1e-2)
    if block:
        optimizer = BlockOptimizer(
            optimizer, model.named_parameters(), switch_block_every=block, switch_mode="ascending", verbose=0
        )
    booster = Booster(plugin=PLUGINS[plugin](**options))
    model, engine, *_ = booster.boost(model, optimizer)
    return model, engine, booster


def data_rank(booster: Booster) -> int:
    group = getattr(booster.plugin, "dp_group", None)
    return dist.get_rank() if group is None else dist.get_rank(group)


def backward(model: Any, engine: Any, booster: Booster, index: int, factor: float = 1.0) -> float:
    loss = net_loss(model, models.tokens(97 * index + data_rank(booster))) * factor
    booster.backward(loss, engine)
    return float(loss.item())


def trained(
    plugin: str,
    options: dict[str, Any],
    hyper: dict[str, Any],
    steps: int,
    dtype: torch.dtype = torch.float64,
    accumulate: int = 1,
    no_sync: bool = False,
    block: int = 0,
) -> dict[str, Any]:
    """Losses, norms and weights of this rank's replica; steps at which images were reduced."""
    model, engine, booster = boosted(plugin, options, hyper, dtype=dtype, block=block, net=dtype == torch.float64)
    losses, norms, images = [], [], []
    for step in range(steps):
        for part in range(accumulate - 1):
            if no_sync:
                with booster.no_sync(model, engine):
                    losses.append(backward(model, engine, booster, step * accumulate + part))
            else:
                losses.append(backward(model, engine, booster, step * accumulate + part))
        losses.append(backward(model, engine, booster, step * accumulate + accumulate - 1))
        images.append(len(engine._reducer.low_rank))
        engine.step()
        norms.append(engine.get_grad_norm())
        engine.zero_grad()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "images": images,
        "weights": weights,
        "replicas": replicas(engine, booster),
    }


def replicas(engine: Any, booster: Booster) -> bool:
    """Whether the working weights of all data-parallel ranks are bitwise equal."""
    return equal_on_ranks(engine.layouts, getattr(booster.plugin, "dp_group", dist.group.WORLD))


def compared(*args: Any, low_rank: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    """`trained` with images against `trained` with whole gradients."""
    plugin, options, *rest = args
    images = trained(plugin, {**options, "low_rank": LowRankOptions(**(low_rank or {}))}, *rest, **kwargs)
    whole = trained(plugin, {**options, "low_rank": LowRankOptions(reduce=False)}, *rest, **kwargs)
    return {
        "losses": largest_error(images["losses"], whole["losses"]),
        "weights": largest_error(images["weights"], whole["weights"]),
        "images": images["images"],
        "without": whole["images"],
        "replicas": images["replicas"] and whole["replicas"],
        "moved": abs(whole["losses"][0] / whole["losses"][-1] - 1),
        "norm": max(whole["norms"]),
        "loss": max(whole["losses"]),
    }


def compare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return compared(*args, **kwargs)


def injected(options: dict[str, Any], hyper: dict[str, Any], steps: int) -> dict[str, Any]:
    """Tensor parallelism with given gradients that differ by data-parallel rank, in float64: images against wholes."""
    found, counts = [], []
    for reduce in (True, False):
        low_rank = {**options, "low_rank": LowRankOptions(reduce=reduce)}
        model, engine, booster = boosted("hybrid", low_rank, hyper, dtype=torch.float64)
        names = {param: name for name, param in model.module.named_parameters()}
        images = []
        for step in range(steps):
            for param, layout in engine.layouts.items():
                # Small multiples of 3/32: bf16 holds them and their means over two ranks.
                seed = zlib.crc32(f"{names[param]}{step}{data_rank(booster)}".encode())
                generator = torch.Generator().manual_seed(seed)
                grad = torch.randint(-40, 41, layout.shape, generator=generator) * (3 / 32)
                param.grad = layout.shard(grad.to(param.dtype))
            engine.sync_dp_grads()
            images.append(len(engine._reducer.low_rank))
            engine.step()
            engine.zero_grad()
        counts.append(images)
        found.append([engine.masters.of[param].detach().clone() for param in engine.layouts])
    error = largest_error(*found)
    return {"error": error, "images": counts[0], "without": counts[1], "replicas": replicas(engine, booster)}


def payloads(options: dict[str, Any], hyper: dict[str, Any], low_rank: dict[str, Any]) -> dict[str, Any]:
    """Of a model in which projected matrices alone are trained, by step: bytes of backward, calls of the inner step."""
    options = {**options, "low_rank": LowRankOptions(**low_rank)}
    model, engine, booster = boosted("zero", options, hyper, dtype=torch.bfloat16, only=True)
    counts, inner = [], []
    engine.optim.register_step_pre_hook(lambda *_: inner.append(CollectiveCounter().__enter__()))
    engine.optim.register_step_post_hook(lambda *_: inner[-1].__exit__(None, None, None))
    for step in range(GAP + 1):
        with CollectiveCounter() as counter:
            backward(model, engine, booster, step)
        reduced = dict(counter.bytes)
        engine.step()
        engine.zero_grad()
        counts.append({"reduced": reduced, "inner": dict(inner[-1].calls)})
    shapes = [tuple(layout.shape) for layout in engine.layouts.values()]
    state = sum(storages(list(engine.optim.state.values())).values())
    return {"counts": counts, "shapes": shapes, "state": state}


class GradientWatch:
    """Notices gradients that live on after the hooks of their parameter.

    Args:
        params: watched; made before boosting, so that its hooks run before the engine's.

    Attributes:
        survivors: shapes of gradients that were alive when a later parameter's came, or at the end.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.survivors: list[tuple[int, ...]] = []
        self._seen: list[tuple[tuple[int, ...], StorageWeakRef]] = []
        for param in params:
            param.register_post_accumulate_grad_hook(self._on_grad)

    def _on_grad(self, param: Tensor) -> None:
        self.check()
        assert param.grad is not None
        self._seen.append((tuple(param.shape), StorageWeakRef(param.grad.untyped_storage())))

    def check(self) -> None:
        self.survivors += [shape for shape, storage in self._seen if not storage.expired()]
        self._seen.clear()


def survivors(stage: int, low_rank: dict[str, Any], overlap: bool) -> list[int]:
    """Gradients of projected layers that outlive their hook, by step."""
    model = models.llama(layers=2).bfloat16()
    watch = GradientWatch(matrices(model))
    others = [param for param in model.parameters() if all(param is not other for other in matrices(model))]
    groups = [{"params": matrices(model), "rank": RANK, "update_proj_gap": GAP}, {"params": others}]
    plugin = LowLevelZeroPlugin(
        stage=stage, precision="bf16", overlap_communication=overlap, low_rank=LowRankOptions(**low_rank)
    )
    booster = Booster(plugin=plugin)
    model, engine, *_ = booster.boost(model, GaLoreAdamW(groups, lr=1e-2))
    counts = []
    for step in range(GAP):
        watch.survivors.clear()
        backward(model, engine, booster, step)
        watch.check()
        counts.append(len(watch.survivors))
        engine.step()
        engine.zero_grad()
    return counts


def overflow(stage: int) -> dict[str, Any]:
    """fp16 in which rank 1 alone overflows at the third step, between refreshes."""
    options = {"stage": stage, "precision": "fp16", "initial_scale": 2.0**8, "hysteresis": 1}
    model, engine, booster = boosted("zero", options, {}, dtype=torch.float16)
    images, steps = [], []
    for step in range(GAP + 2):
        overflows = step == 2 and dist.get_rank() == 1
        before = [param.detach().clone() for param in engine.layouts]
        backward(model, engine, booster, step, float("inf") if overflows else 1.0)
        images.append(len(engine._reducer.low_rank))
        engine.step()
        engine.zero_grad()
        if step == 2:
            unchanged = all(torch.equal(old, new) for old, new in zip(before, engine.layouts, strict=True))
        steps.append(max(state["step"] for state in engine.optim.state.values()) if engine.optim.state else 0)
    finite = all(bool(param.isfinite().all()) for param in model.parameters())
    return {
        "images": images,
        "steps": steps,
        "unchanged": unchanged,
        "finite": finite,
        "replicas": replicas(engine, booster),
        "scale": engine.mixed_precision_mixin.loss_scale,
    }


def clipped(plugin: str, options: dict[str, Any]) -> dict[str, Any]:
    """Norms of three steps clipped by images, the same batch on all ranks, before and (right on one rank) after."""
    options = {**options, "low_rank": LowRankOptions(clip_by_image=True), "max_norm": MAX_NORM}
    model, engine, booster = boosted(plugin, options, {"svd_method": "random"}, dtype=torch.float32)
    norms, given, images = [], [], []

    def watch(*_: Any) -> None:
        held = engine._transport._grads
        whole = [master.grad for param, master in engine.masters.of.items() if param not in held]
        given.append(math.sqrt(sum(part.double().square().sum().item() for part in [*held.values(), *whole])))

    engine.optim.register_step_pre_hook(watch)
    for step in range(3):
        booster.backward(models.loss(model, models.tokens(step)), engine)
        images.append(len(engine._reducer.low_rank))
        engine.step()
        norms.append(engine.get_grad_norm())
        engine.zero_grad()
    return {"norms": norms, "given": given, "images": images}


def gathered(
    options: dict[str, Any], hyper: dict[str, Any], steps: int, dtype: torch.dtype, block: int = 0
) -> dict[str, Any]:
    """Training with gathered weights against training with gathered images; bytes of the gathers of the last step."""
    found, counts, equal = [], [], True
    for gather in (False, True):
        low_rank = {**options, "master_weights": False, "low_rank": LowRankOptions(gather=gather)}
        net = dtype == torch.float64
        model, engine, booster = boosted("zero", low_rank, hyper, dtype=dtype, only=True, net=net, block=block)
        for step in range(steps):
            backward(model, engine, booster, step)
            with CollectiveCounter() as counter:
                engine.step()
            engine.zero_grad()
        counts.append(counter.bytes["all_gather_into_tensor"])
        equal &= replicas(engine, booster)
        parts = [
            (engine.masters.of[param], engine.masters.make_master(param))
            for param in engine.layouts
            if param.requires_grad
        ]
        equal &= all(torch.equal(master, part) for master, part in parts)
        found.append({name: param.detach().clone() for name, param in model.named_parameters()})
    differences = [(found[0][name].double() - weight.double()).abs() for name, weight in found[1].items()]
    shapes = [tuple(layout.shape) for param, layout in engine.layouts.items() if param.requires_grad]
    return {
        "error": largest_error(*found),
        "mean": torch.cat([difference.view(-1) for difference in differences]).mean().item(),
        "replicas": equal,
        "bytes": counts,
        "shapes": shapes,
    }


def refusals() -> list[str]:
    """What is said of options that would be ignored."""
    errors = []
    for plugin, options, hyper in (
        ("zero", {"stage": 2, "precision": "bf16"}, {}),
        ("zero", {"stage": 2, "precision": "bf16", "master_weights": False}, {}),
        ("hybrid", {"tp_size": 1, "pp_size": 1, "zero_stage": 0, "precision": "bf16"}, {}),
        ("ddp", {}, {}),
    ):
        try:
            boosted(plugin, {**options, "low_rank": LowRankOptions(gather=True)}, hyper, dtype=torch.bfloat16)
        except ValueError as error:
            errors.append(str(error))
    return errors


def pipelined(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Largest difference of this stage's weights and losses between images and whole gradients; images by step."""
    found, losses, counts, norms = [], [], [], []
    for reduce in (True, False):
        low_rank = {**options, "low_rank": LowRankOptions(reduce=reduce)}
        hyper = {"inner": "sgd", "svd_method": "random"}
        model, engine, booster = boosted("hybrid", low_rank, hyper, dtype=torch.float32)
        images, seen = [], []
        for step in range(steps):
            batch = models.tokens(97 * step + data_rank(booster), batch=4)
            outputs = booster.execute_pipeline(
                iter([{"input_ids": batch, "labels": batch}]),
                model,
                lambda output, _: output.loss,
                engine,
                return_loss=True,
            )
            images.append(len(engine._reducer.low_rank))
            engine.step()
            engine.zero_grad()
            norms.append(engine.get_grad_norm())
            seen.append(0.0 if outputs["loss"] is None else outputs["loss"].item())
        counts.append(images)
        losses.append(seen)
        found.append([engine.masters.of[param].detach().clone() for param in engine.layouts])
    return {
        "weights": largest_error(*found),
        "losses": largest_error(*losses),
        "images": counts,
        "norm": max(norms),
        "loss": max(losses[1]),
    }
