"""What ranks run in test_ratio_plugins.py: the parameter-ratio form under the real plugins, on given gradients."""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.distributed as dist
from colossalai.booster import Booster
from on_ranks import equal_on_ranks, gradient
from torch import Tensor

from colossal_bcd import BlockOptimizerRatio
from colossal_bcd.booster import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin, explain
from colossal_bcd.testing import CollectiveCounter, live_bytes, storages
from support.errors import largest_error

STEPS = 8


def optimizer_of(model: Any, mode: Any, **options: Any) -> BlockOptimizerRatio:
    return BlockOptimizerRatio(
        [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
         {"params": [p for p in model.parameters() if p.dim() <= 1], "lr": 5e-3}],
        list(model.named_parameters()), update_ratio=0.3, switch_every=3, mask_mode=mode, lr=1e-2, verbose=0,
        include_lm_head=True, **options,
    )  # fmt: skip


def plugin_of(kind: str, options: dict[str, Any]) -> Any:
    return {"zero": LowLevelZeroPlugin, "hybrid": HybridParallelPlugin}[kind](precision="bf16", **options)


def trained_alone(mode: Any) -> dict[str, Tensor]:
    """In float32 from the bf16 weights, as the engine's masters are."""
    model = models.llama().bfloat16().float()
    optimizer = optimizer_of(model, mode)
    for step in range(STEPS):
        for name, param in model.named_parameters():
            param.grad = gradient(name, tuple(param.shape), step)
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def injected(kind: str, options: dict[str, Any], mode: Any) -> dict[str, Any]:
    """Largest error of this rank's masters, whether replicas are equal, and bytes of moments here after each step."""
    model: Any = models.llama()
    names = {id(param): name for name, param in model.named_parameters()}
    want = trained_alone(mode)
    optimizer = optimizer_of(model, mode)
    booster = Booster(plugin=plugin_of(kind, options))
    model, engine, *_ = booster.boost(model, optimizer)
    held = []
    for step in range(STEPS):
        for param in engine.masters.of:
            layout = engine.layouts[param]
            param.grad = layout.shard(gradient(names[id(param)], layout.shape, step)).to(param.dtype)
        engine.sync_dp_grads()
        engine.step()
        engine.zero_grad()
        held.append(sum(storages([dict(state) for state in engine.optim.state.values()]).values()))
    worst, equal = 0.0, True
    for param, master in engine.masters.of.items():
        part = engine.masters.layout(param)
        data, goal = slice(0, part.num_local), part.shard(want[names[id(param)]]).view(-1)
        worst = max(worst, largest_error(master.view(-1)[data], goal[data]))
        group = getattr(booster.plugin, "dp_group", dist.group.WORLD)
        equal &= equal_on_ranks([param], None if engine.layouts[param].split is None else group)
    frozen = [name for name, param in model.unwrap().named_parameters() if param not in engine.masters.of]
    return {"error": worst, "equal": equal, "bytes": held, "frozen": frozen}


def alone() -> list[float]:
    """Losses of `trained` with all ranks' batches on one process."""
    model: Any = models.llama()
    optimizer = optimizer_of(model, "scatter")
    losses = []
    for step in range(STEPS):
        loss = models.loss(model, torch.cat([models.tokens(4 * step + i) for i in range(4)]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(kind: str, options: dict[str, Any], dense: bool = False, accumulation: int = 1) -> list[float]:
    """Mean losses of a real run in float32."""
    model: Any = models.llama()
    optimizer = optimizer_of(model, "scatter", dense_gradients=dense)
    plugin = {"zero": LowLevelZeroPlugin, "ddp": TorchDDPPlugin}[kind]
    booster = Booster(plugin=plugin(**options))
    model, engine, *_ = booster.boost(model, optimizer)
    losses = []
    share = 4 // dist.get_world_size() // accumulation
    for step in range(STEPS):
        total = 0.0
        for micro in range(accumulation):
            first = (dist.get_rank() * accumulation + micro) * share
            batch = torch.cat([models.tokens(4 * step + first + i) for i in range(share)])
            loss = models.loss(model, batch) / accumulation
            booster.backward(loss, engine)
            total += loss.item()
        engine.step()
        engine.zero_grad()
        losses.append(total)
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).tolist()


def resumed(folder: str) -> bool:
    """Whether files of a run under TorchDDPPlugin, saved while the second share trains, go on bit for bit."""

    def boosted(seed: int) -> tuple[Booster, Any, Any]:
        model: Any = models.llama(seed=seed)
        booster = Booster(plugin=TorchDDPPlugin())
        model, optimizer, *_ = booster.boost(model, optimizer_of(model, "scatter"))
        return booster, model, optimizer

    def train(run: tuple[Booster, Any, Any], steps: range) -> list[Tensor]:
        booster, model, optimizer = run
        for step in steps:
            booster.backward(models.loss(model, models.tokens(2 * step + dist.get_rank())), optimizer)
            optimizer.step()
            optimizer.zero_grad()
        return [param.detach().clone() for param in model.unwrap().parameters()]

    run = boosted(0)
    train(run, range(4))
    run[0].save_model(run[1], f"{folder}/model.pt")
    run[0].save_optimizer(run[2], f"{folder}/optimizer.pt")
    dist.barrier()
    want, again = train(run, range(4, 7)), boosted(7)
    again[0].load_model(again[1], f"{folder}/model.pt")
    again[0].load_optimizer(again[2], f"{folder}/optimizer.pt")
    return all(map(torch.equal, train(again, range(4, 7)), want))


def hooks_after_boosting() -> list[int]:
    """Hooks of the optimizer's own that are left on parameters; the engine feeds the gradients."""
    model: Any = models.llama()
    optimizer = optimizer_of(model, "adjacent")
    booster = Booster(plugin=LowLevelZeroPlugin(stage=1, precision="fp32", overlap_communication=False))
    booster.boost(model, optimizer)
    return [
        sum(getattr(hook, "__self__", None) is optimizer for hook in (param._post_accumulate_grad_hooks or {}).values())
        for param in model.parameters()
    ]


def traffic(stage: int) -> dict[str, int]:
    """Payload of the gradients' collectives of one backward pass in float32, and what they leave of gradients here."""
    model: Any = models.llama()
    optimizer = optimizer_of(model, "scatter")
    booster = Booster(plugin=LowLevelZeroPlugin(stage=stage, precision="fp32"))
    model, engine, *_ = booster.boost(model, optimizer)
    reported = {}
    for step in range(2):
        loss = models.loss(model, models.tokens(step))
        before = live_bytes()
        with CollectiveCounter() as counter:
            booster.backward(loss, engine)
        del loss
        reported = {**counter.bytes, "held": live_bytes() - before, "calls": counter.total}
        engine.step()
        engine.zero_grad()
    return reported


def explained() -> str:
    """What `explain` says of a boosted optimizer."""
    model: Any = models.llama()
    optimizer = optimizer_of(model, "adjacent")
    booster = Booster(plugin=LowLevelZeroPlugin(stage=1, precision="fp32"))
    _, engine, *_ = booster.boost(model, optimizer)
    return explain(engine)
