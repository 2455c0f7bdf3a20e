"""What ranks run in test_faults.py: ranks that are killed, stopped, given something else, or get NaN."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import checkpoint_cases as cases
import models
import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import LR, Run
from colossalai.booster import Booster
from on_ranks import heard, message_of

from colossal_bcd import AdamW, BlockOptimizer
from colossal_bcd.booster import CheckpointFolder, LowLevelZeroPlugin
from colossal_bcd.checkpoint import assembly as plan
from colossal_bcd.checkpoint import files, folder
from colossal_bcd.engine import failures as faults
from colossal_bcd.engine.failures import TIMEOUT

GOOD = 1
"""Steps before the last good checkpoint, which lies in the middle of a block."""


def die(*_: Any, **__: Any) -> None:
    Path(os.environ["DIED"]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def stop(*_: Any, **__: Any) -> None:
    Path(os.environ["DIED"]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)


def killed(where: str, mesh: str, path: str, act: Any = die) -> None:
    """Save after a step, go on, and lose a rank at the named place: the one that writes files, or the other one."""
    os.environ["DIED"] = f"{path}/died"
    run = Run(mesh, "badam-came")
    checkpoints = CheckpointFolder(path)
    for step in range(GOOD):
        run.step(step)
    checkpoints.save(run.booster, run.model, run.engine, run.scheduler, step=GOOD)
    if dist.get_rank() == (0 if where == "write" else dist.get_world_size() - 1):
        arm(where, run, act)
    if where in ("save", "write", "random"):
        checkpoints.save(run.booster, run.model, run.engine, run.scheduler, step=GOOD + 1)
    for step in range(GOOD, GOOD + 4):
        run.step(step)
    raise AssertionError("nobody died")


def arm(where: str, run: Run, act: Any) -> None:
    """Let this rank end or stop itself at a place of its next steps."""
    engine: Any = run.engine
    if where == "average":
        engine._reducer._launch = act
        engine._reducer.finish = act
    elif where == "rule":
        engine.optim.base_optimizer.step = act
    elif where == "gather":
        engine.write_back = act
    elif where == "switch":
        engine._agree = act
    elif where == "save":
        plan.dist.send = act
    elif where == "write":
        files.TensorFile.close = act
    elif where == "random":
        folder.save_random_state = act
    elif where == "forward":
        run.model.register_forward_pre_hook(act)


def limited(seconds: float, what: Any, *args: Any) -> Any:
    """Run with a time limit of collectives."""
    os.environ[TIMEOUT] = str(seconds)
    return what(*args)


def go_on(mesh: str, folder: str) -> tuple[int, list[float | None]]:
    """In fresh processes: the step of the checkpoint, and the losses after it."""
    run = Run(mesh, "badam-came")
    resumed = CheckpointFolder(folder).load(run.booster, run.model, run.engine, run.scheduler)
    assert resumed is not None
    return resumed.step, [run.step(step) for step in range(GOOD, GOOD + 2)]


def straight(mesh: str) -> list[float | None]:
    run = Run(mesh, "badam-came")
    return [run.step(step) for step in range(GOOD + 2)][GOOD:]


def different(what: str) -> str:
    """The error where the last rank was given something else."""
    mine = dist.get_rank() == dist.get_world_size() - 1
    model = models.llama(vocab=250 if what != "model" or not mine else 200, layers=3)
    lr = 2 * LR if what == "lr" and mine else LR
    base: Any = AdamW(model.parameters(), lr=lr)
    if what in ("seed", "blocks"):
        lists = [[["model.layers.0"], ["model.layers.1"]], [["model.layers.0"], ["model.layers.2"]]]
        names = list(model.named_parameters())
        base = BlockOptimizer(
            base,
            names,
            lists[what == "blocks" and mine],
            switch_block_every=3,
            seed=int(what == "seed" and mine),
            verbose=0,
        )
    if what == "class" and mine:
        base = torch.optim.AdamW(model.parameters(), lr=lr)
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="fp32"))
    return message_of(lambda: booster.boost(model, base))


def not_finite(precision: str, value: float, folder: str) -> dict[str, Any]:
    """One rank's gradient is not finite in one step: what every rank does."""
    run = Run("zero2 x2", "adamw", precision=precision)
    checkpoints = CheckpointFolder(folder)
    run.step(0)
    checkpoints.save(run.booster, run.model, run.engine, run.scheduler, step=1)
    handle = None
    if dist.get_rank() == 1:
        weight = next(run.model.unwrap().parameters())
        handle = weight.register_hook(lambda grad: torch.full_like(grad, value))
    before = [param.detach().clone() for param in run.model.unwrap().parameters()]
    errors = []
    for act in (lambda: run.step(1), lambda: save(run, checkpoints), lambda: run.step(2)):
        try:
            act()
            errors.append("none")
        except (FloatingPointError, ValueError) as error:
            errors.append(str(error))
        if handle is not None:
            handle.remove()
            handle = None
        if len(errors) == 1:
            after = [param.detach().clone() for param in run.model.unwrap().parameters()]
            skipped = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"errors": errors, "skipped": skipped, "steps": checkpoints.steps()}


def save(run: Run, checkpoints: CheckpointFolder) -> None:
    checkpoints.save(run.booster, run.model, run.engine, run.scheduler, step=2)


def limits(seconds: str) -> list[float]:
    """Seconds that each group of this rank may wait after a plugin was constructed."""
    os.environ[TIMEOUT] = seconds
    _booster = Booster(plugin=cases.HybridParallelPlugin(tp_size=2, pp_size=1, zero_stage=0, precision="fp32"))
    groups = [group for group in dist.distributed_c10d._world.pg_map if group is not faults.patient_group()]
    options = [group._get_backend(torch.device("cpu")).options for group in groups]
    return [option._timeout.total_seconds() for option in options]


def slow_writer(path: str) -> float:
    """Seconds of saving a checkpoint for which one rank alone works for longer than the time limit."""
    run = Run("zero2 x2", "badam-came")
    if dist.get_rank() == 0:
        publish = CheckpointFolder._publish
        CheckpointFolder._publish = lambda *args: (time.sleep(9), publish(*args))[1]  # type: ignore[method-assign]
    began = time.monotonic()
    CheckpointFolder(path).save(run.booster, run.model, run.engine, run.scheduler, step=1)
    run.step(0)
    return time.monotonic() - began


def limits_twice() -> tuple[list[str], float]:
    """What is logged where a second plugin is given another limit, and seconds until the default group gives up."""
    with heard(logging.WARNING) as messages:
        for seconds in ("2", "2", "40"):
            os.environ[TIMEOUT] = seconds
            LowLevelZeroPlugin(stage=2)
    began = time.monotonic()
    if dist.get_rank() == 0:  # the other rank has nothing more to do, and lives until this one has its result
        with pytest.raises(RuntimeError, match="Timed out"):
            dist.barrier()
    return messages, time.monotonic() - began


def wrong_limit() -> str:
    os.environ[TIMEOUT] = "soon"
    return message_of(lambda: LowLevelZeroPlugin(stage=2))
