"""What ranks run in test_checkpoint_errors.py: damaged files, full disks, other optimizers, foreign state dicts."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_cases as cases
import models
import torch
import torch.distributed as dist
from checkpoint_cases import Run
from colossalai.booster import Booster
from on_ranks import message_of
from torch import Tensor

from colossal_bcd.booster import CheckpointError, CheckpointFolder, TorchDDPPlugin
from colossal_bcd.optim.state.filed import filed_like
from colossal_bcd.testing import PeakBytes


def message(call: Callable[[], Any]) -> str:
    return message_of(call, (CheckpointError,))


def snapshot(run: Run) -> list[Tensor]:
    """Everything that a failed load may have changed."""
    base = getattr(run.engine.optim, "base_optimizer", run.engine.optim)
    state = [value for states in base.state.values() for value in states.values() if isinstance(value, Tensor)]
    numbers = [float(group["lr"]) for group in base.param_groups] + [float(getattr(run.engine.optim, "num_steps", 0))]
    weights = [param.detach() for param in run.model.unwrap().parameters()]
    return [tensor.clone() for tensor in [*weights, *state, *run.engine.masters.of.values(), torch.tensor(numbers)]]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def damage(folder: Path, how: str) -> None:
    """Harm one tensor file, or the index."""
    index = folder / "optimizer_index.json"
    said = json.loads(index.read_text())
    path = folder / sorted(said["files"])[-1]
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "corrupted":
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    elif how == "no index":
        index.unlink()
    elif how == "broken index":
        index.write_text(index.read_text()[:100])
    elif how == "foreign index":
        index.write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    elif how == "newer version":
        index.write_text(json.dumps({**said, "version": 99}))


DAMAGES = ["missing", "truncated", "corrupted", "no index", "broken index", "foreign index", "newer version"]


def damaged(folder: str) -> dict[str, tuple[str, bool]]:
    """Of every damage the error, and whether the running optimizer is untouched."""
    run = Run("zero2 x2", "badam-came")
    for step in range(2):
        run.step(step)
    run.save(folder)
    run.step(2)
    result = {}
    for how in DAMAGES:
        copy = Path(folder, how)
        if dist.get_rank() == 0:
            shutil.copytree(Path(folder, "optimizer"), copy)
            damage(copy, how)
        dist.barrier()
        before = snapshot(run)
        text = message(lambda copy=copy: run.booster.load_optimizer(run.engine, str(copy)))
        result[how] = text, same(before, snapshot(run))
    return result


def damaged_file(folder: str) -> dict[str, str]:
    """Errors of unsharded files."""
    run = Run("zero2 x2", "came")
    run.step(0)
    good = Path(folder, "good.bin")
    run.booster.save_optimizer(run.engine, str(good))
    if dist.get_rank() == 0:
        data = good.read_bytes()
        Path(folder, "truncated").write_bytes(data[: len(data) // 2])
        corrupted = bytearray(data)
        corrupted[len(data) // 2] ^= 1
        Path(folder, "corrupted").write_bytes(corrupted)
        torch.save({"weight": torch.zeros(2)}, Path(folder, "a model"))
        torch.save({"state": {}, "param_groups": [], "object": Path("x")}, Path(folder, "an object"))
        Path(folder, "text").write_text("no checkpoint")
    dist.barrier()
    names = ["absent", "truncated", "corrupted", "a model", "an object", "text"]
    return {
        name: message(lambda name=name: run.booster.load_optimizer(run.engine, f"{folder}/{name}")) for name in names
    }


def of_another_run(folder: str) -> dict[str, tuple[str, bool]]:
    """Errors of checkpoints that are whole, but of something else."""
    made = {name: Run("zero2 x2", name) for name in ("came", "adamw", "lamb", "badam")}
    for name, run in made.items():
        run.step(0)
        run.save(f"{folder}/{name}")
    result = {}
    for ours, theirs in [("came", "adamw"), ("adamw", "lamb"), ("badam", "torch"), ("adamw", "badam")]:
        theirs = "adamw" if theirs == "torch" else theirs
        before = snapshot(made[ours])
        path = f"{folder}/{theirs}/optimizer"
        text = message(lambda ours=ours, path=path: made[ours].booster.load_optimizer(made[ours].engine, path))
        result[f"{theirs} into {ours}"] = text, same(before, snapshot(made[ours]))
    other = Run("zero2 x2", "adamw", precision="fp32")
    text = message(lambda: other.booster.load_optimizer(other.engine, f"{folder}/adamw/optimizer"))
    result["bf16 into fp32"] = text, True
    return result


def full_disk(folder: str) -> dict[str, Any]:
    """Files may grow to 60 kB on the writing rank: a save fails on all ranks, and the one before stays."""
    run = Run("tp2", "badam")
    checkpoints = CheckpointFolder(folder)
    checkpoints.save(run.booster, run.model, run.engine, run.scheduler, step=1)
    run.booster.save_optimizer(run.engine, f"{folder}/alone", shard=True)
    before = sorted(path.name for path in Path(folder, "alone").iterdir())
    run.step(0)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    texts = [
        message(lambda: checkpoints.save(run.booster, run.model, run.engine, run.scheduler, step=2)),
        message(lambda: run.booster.save_optimizer(run.engine, f"{folder}/alone", shard=True)),
        message(lambda: run.booster.save_optimizer(run.engine, f"{folder}/file.bin")),
    ]
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    left = sorted(path.name for path in Path(folder).iterdir())
    fresh = Run("tp2", "badam")
    resumed = checkpoints.load(fresh.booster, fresh.model, fresh.engine, fresh.scheduler)
    fresh.booster.load_optimizer(fresh.engine, f"{folder}/alone")
    unchanged = before == sorted(path.name for path in Path(folder, "alone").iterdir())
    return {"texts": texts, "left": left, "step": resumed.step if resumed else None, "unchanged": unchanged}


def loops(folder: str) -> dict[str, Any]:
    """A training loop that keeps two checkpoints, one of them saved twice, beside what a killed save has left."""
    run = Run("zero2 x2", "badam")
    checkpoints = CheckpointFolder(folder, keep_last=2)
    nothing = checkpoints.load(run.booster, run.model, run.engine, run.scheduler)
    if dist.get_rank() == 0:
        Path(folder, ".incomplete-step-00000009").mkdir(parents=True)
        Path(folder, "step-00000099").mkdir()
    for step in (1, 2, 3, 3):
        run.step(step)
        extra = {"losses": [0.5] * step}
        checkpoints.save(run.booster, run.model, run.engine, run.scheduler, step=step, extra=extra)
    dist.barrier()
    resumed = checkpoints.load(run.booster, run.model, run.engine, run.scheduler)
    earlier = checkpoints.peek(2)
    missing = message(lambda: checkpoints.load(run.booster, run.model, run.engine, step=1))
    assert resumed is not None
    assert earlier is not None
    return {
        "nothing": nothing,
        "steps": checkpoints.steps(),
        "names": sorted(path.name for path in Path(folder).iterdir()),
        "resumed": (resumed.step, resumed.extra),
        "earlier": earlier.step,
        "missing": missing,
    }


def damaged_model(folder: str) -> tuple[str, bool]:
    run = Run("zero2 x2", "badam")
    checkpoints = CheckpointFolder(folder)
    run.step(0)
    checkpoints.save(run.booster, run.model, run.engine, run.scheduler, step=1)
    if dist.get_rank() == 0:
        path = next(checkpoints.folder(1).glob("model/*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    run.step(1)
    before = snapshot(run)
    text = message(lambda: checkpoints.load(run.booster, run.model, run.engine, run.scheduler))
    return text, same(before, snapshot(run))


def peak_of_saving(folder: str) -> tuple[int, int, int]:
    """New bytes at once while saving in one shard; the largest tensor's bytes; those of all."""
    run = Run("zero2 x2", "came")
    run.step(0)
    run.booster.save_optimizer(run.engine, f"{folder}/first", shard=True)
    with PeakBytes() as measured:
        run.booster.save_optimizer(run.engine, f"{folder}/second", shard=True)
    sizes = [4 * 250 * 64]
    total = sum(path.stat().st_size for path in Path(folder, "second").glob("*.safetensors"))
    return measured.peak, max(sizes), total


def random_state(folder: str) -> list[bool]:
    """Whether torch's random numbers of each rank go on."""
    run = Run("zero2 x2", "adamw")
    checkpoints = CheckpointFolder(folder)
    torch.manual_seed(dist.get_rank())
    torch.rand(3)
    checkpoints.save(run.booster, run.model, run.engine, step=1)
    want = torch.rand(5)
    torch.manual_seed(77)
    checkpoints.load(run.booster, run.model, run.engine)
    return [torch.equal(torch.rand(5), want)]


def loss_scale(folder: str) -> list[tuple[float, int, int]]:
    """Scale, and steps since it last changed, before and after."""
    result = []
    for resume in (False, True):
        run = Run("zero2 x2", "adamw", precision="fp16", growth_interval=3)
        if resume:
            run.load(folder)
        else:
            for step in range(5):
                run.step(step)
            run.save(folder)
        scaler = run.engine.mixed_precision_mixin.grad_scaler
        result.append((scaler._scale.item(), scaler._growth_step, scaler._hysteresis_step))
    return result


def state_dicts() -> list[bool]:
    """`state_dict` of the boosted optimizer is whole and the same on all ranks, and loads."""
    run, other = Run("tp2", "came"), Run("tp2", "came")
    for step in range(2):
        run.step(step)
    state = run.engine.state_dict()
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, {key: value["exp_avg"].sum().item() for key, value in state["state"].items()})
    other.engine.load_state_dict(state)
    other.model.unwrap().load_state_dict(run.model.unwrap().state_dict())
    other.model.update_master_params()
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    equal = all(run.step(step) == other.step(step) for step in (2, 3))
    return [gathered[0] == gathered[1], state["state"][0]["exp_avg"].shape == (250, 64), equal]


class Buffers:
    """A contributor with one tensor for each parameter, trained now or not."""

    def __init__(self, run: Run, fill: bool) -> None:
        self.count = 0
        self.layouts = run.engine.layouts
        self.of = {
            param: layout.shard(torch.rand(layout.shape, generator=torch.Generator().manual_seed(i)) * fill)
            for i, (param, layout) in enumerate(self.layouts.items())
        }

    def filed(self) -> Any:
        return [
            (param, {"buffer": tensor}, [filed_like("buffer", tensor, self.layouts[param])])
            for param, tensor in self.of.items()
        ]

    def numbers(self) -> dict[str, Any]:
        return {"count": self.count}

    def load(self, numbers: dict[str, Any], saved: dict[Any, list[str]]) -> None:
        assert saved == {param: ["buffer"] for param in self.of}
        self.count = numbers["count"]


def contributed(mesh: str, folder: str, save: bool) -> tuple[int, bool]:
    """A part of a block optimizer that brings state of its own: what is loaded, and whether it is what was saved."""
    run = Run(mesh, "badam")
    run.step(0)
    saved = Buffers(run, fill=True)
    buffers = saved if save else Buffers(run, fill=False)
    run.engine.optim.contributors = {"buffers": buffers}
    if save:
        buffers.count = 5
        run.booster.save_optimizer(run.engine, folder, shard=True)
    else:
        run.booster.load_optimizer(run.engine, folder)
    return buffers.count, all(torch.equal(saved.of[param], buffers.of[param]) for param in saved.of)


def ddp(optimizer: str, folder: str) -> list[list[float]]:
    """Losses after a checkpoint under torch's data parallelism: of the run that went on, and of a fresh one."""
    losses = []
    for resume in (False, True):
        model = models.llama(vocab=250, layers=3)
        made = cases.MAKE[optimizer](model)
        booster = Booster(plugin=TorchDDPPlugin())
        model, engine, *_ = booster.boost(model, made)
        checkpoints = CheckpointFolder(folder)
        if resume:
            checkpoints.load(booster, model, engine)
        kept: list[float] = []
        for step in range(3 if resume else 0, 5):
            loss = models.loss(model, models.tokens(2 * step + dist.get_rank(), vocab=250))
            booster.backward(loss, engine)
            engine.step()
            engine.zero_grad()
            if step >= 3:
                kept.append(loss.item())
            if step == 2:
                checkpoints.save(booster, model, engine, step=3)
        losses.append(kept)
    return losses
