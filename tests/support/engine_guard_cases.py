"""What ranks run in test_engine_guards.py: unusual uses of the engine, each once wrong or silent."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import block_cases
import models
import torch
import torch.distributed as dist
from block_cases import PERIOD
from colossalai.booster import Booster
from engine_cases import advance
from on_ranks import message_of

from colossal_bcd import BlockOptimizer, Lamb
from colossal_bcd.booster import FSDP2Plugin, HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossal_bcd.testing import live_bytes

OPTIONS: dict[str, dict[str, Any]] = {
    "zero": {"stage": 2, "precision": "bf16"},
    "hybrid": {"tp_size": 1, "pp_size": 1, "zero_stage": 1, "precision": "bf16"},
    "ddp": {},
}


def loads_weights(plugin: str, folder: str) -> bool:
    """Whether weights loaded after boosting survive the next step, which has an lr of 0."""
    saved = {name: param + 1 for name, param in block_cases.build().state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(saved, Path(folder, "model.pt"))
    dist.barrier()
    model, engine, booster = block_cases.boosted(plugin, OPTIONS[plugin])
    advance(model, engine, booster, 0)
    booster.load_model(model, str(Path(folder, "model.pt")))
    for group in engine.param_groups:
        group["lr"] = 0.0
    advance(model, engine, booster, 1)
    after = model.unwrap(unwrap_peft=False).state_dict()
    return all(torch.equal(saved[name], after[name]) for name in saved)


def plain_optimizer_round_trip(folder: str) -> list[float]:
    """Losses after loading, minus those without the detour, of an AdamW on tp2 with ZeRO over one rank."""
    losses = []
    for reload in (False, True):
        model = models.llama()
        plugin = HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=1, precision="bf16")
        booster = Booster(plugin=plugin)
        model, engine, *_ = booster.boost(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        for step in range(4):
            loss = models.loss(model, models.tokens(step))
            booster.backward(loss, engine)
            engine.step()
            engine.zero_grad()
            if reload and step == 1:
                booster.save_optimizer(engine, f"{folder}/optimizer", shard=True)
                dist.barrier()
                booster.load_optimizer(engine, f"{folder}/optimizer")
        losses.append(loss.item())
    return losses


def never_synchronised() -> list[float]:
    """Losses where every backward pass is under no_sync, or goes around the booster, and as it should be."""
    results = []
    for way in ("booster", "no_sync", "loss.backward"):
        model, engine, booster = block_cases.boosted("zero", {"stage": 1, "precision": "bf16"})
        for step in range(2):
            loss = models.loss(model, block_cases.batch_of(step, dist.get_rank(), different=True))
            if way == "booster":
                booster.backward(loss, engine)
            elif way == "no_sync":
                with booster.no_sync(model, engine):
                    booster.backward(loss, engine)
            else:
                loss.backward()
            engine.step()
            engine.zero_grad()
        results.append(loss.item())
    return results


def lamb_bytes_at_switch() -> float:
    """Bytes beyond the weights when the new block's masters are made, with an optimizer of this package as base."""
    model = block_cases.build()
    before = live_bytes()
    model, engine, booster = block_cases.boosted("zero", OPTIONS["zero"], base="lamb", model=model)
    seen: list[float] = []
    make_master = engine.masters.make_master
    engine.masters.make_master = lambda param: (seen.append(live_bytes() - before), make_master(param))[1]
    for step in range(PERIOD):
        advance(model, engine, booster, step)
    return seen[0]


def stage_bytes(blocks: bool) -> int:
    """Live bytes of a pipeline stage after boosting, with and without blocks; masters of what is trained aside."""
    model = models.llama(layers=4).bfloat16()
    options = {"tp_size": 1, "pp_size": 2, "zero_stage": 0, "precision": "bf16", "num_microbatches": 1}
    optimizer: Any = block_cases.wrap(model) if blocks else Lamb(model.parameters())
    booster = Booster(plugin=HybridParallelPlugin(**options))
    model, engine, *_ = booster.boost(model, optimizer)
    masters = sum(4 * master.numel() for master in engine.masters.of.values())
    del optimizer
    return live_bytes() - masters


def different_frozen_weights() -> bool:
    """Whether ranks that start from different weights hold the same after boosting, frozen ones included."""
    model, _, _booster = block_cases.boosted("zero", OPTIONS["zero"], model=models.llama(seed=dist.get_rank()))
    want = models.llama(seed=0).bfloat16()
    return all(torch.equal(a, b) for a, b in zip(model.module.parameters(), want.parameters(), strict=True))


def clipping_calls() -> list[str]:
    _, engine, _ = block_cases.boosted("zero", OPTIONS["zero"])
    with engine.no_sync():
        within = message_of(lambda: engine.clip_grad_by_value(1.0))
    return [
        message_of(lambda: engine.clip_grad_by_norm(1.0, norm_type=1)),
        within,
        message_of(lambda: engine.get_grad_norm(norm_type=1)),
    ]


def failed_boost() -> bool:
    """Whether a boost that fails leaves frozen what it had thawed."""
    model = models.llama()
    wrapped = block_cases.wrap(model)
    before = [param.requires_grad for param in model.parameters()]
    plugin = LowLevelZeroPlugin(**OPTIONS["zero"])
    model.to = lambda *_: (_ for _ in ()).throw(ValueError("no room"))  # type: ignore[method-assign]
    assert message_of(lambda: Booster(plugin=plugin).boost(model, wrapped)) == "no room"
    return before == [param.requires_grad for param in model.parameters()]


def active_modules(base: str) -> list[bool]:
    """Whether masters and state of an always active module survive a switch."""
    block = {"active_modules": ["model.norm."]}
    model, engine, booster = block_cases.boosted("zero", OPTIONS["zero"], base=base, block=block)
    norm = model.module.model.norm.weight
    for step in range(PERIOD):
        master = engine.masters.of[norm]
        advance(model, engine, booster, step)
    state = engine.optim.state[master]
    return [
        engine.masters.of[norm] is master,
        int(state["step"]) == PERIOD,
        engine.optim.active_blocks()[0].name[-1] == "1",
    ]


def copies(name: str) -> list[str]:
    """Errors of copies of a boosted optimizer, which trains on."""
    plugins = {"ddp": TorchDDPPlugin, "fsdp": FSDP2Plugin, "hybrid": HybridParallelPlugin, "zero": LowLevelZeroPlugin}
    booster = Booster(plugin=plugins[name](**OPTIONS.get(name, {})))
    model = models.llama()
    optimizer = BlockOptimizer(Lamb(model.parameters(), lr=1e-3), list(model.named_parameters()), verbose=0)
    model, engine, *_ = booster.boost(model, optimizer)
    found = [message_of(lambda make=make: make(engine)) for make in (copy.copy, copy.deepcopy, pickle.dumps)]
    advance(model, engine, booster, 0)
    assert optimizer.num_steps == 1
    return found


def emptied_state(name: str) -> bool:
    """Whether a run goes on as before after its state was emptied from outside and loaded again."""
    ends = []
    for empties in (False, True):
        plugin = FSDP2Plugin(precision="fp32") if name == "fsdp" else LowLevelZeroPlugin(stage=1, precision="fp32")
        booster, model = Booster(plugin=plugin), models.llama()
        model, engine, *_ = booster.boost(model, Lamb(model.parameters(), lr=1e-2))
        for step in range(4):
            if empties and step == 2:
                state = engine.state_dict()
                engine.optim.state = []
                engine.load_state_dict(state)
            booster.backward(models.loss(model, models.tokens(step)), engine)
            engine.step()
            engine.zero_grad()
        ends.append([master.detach().clone() for master in engine.working_to_master_param.values()])
    return all(map(torch.equal, *ends))
