"""The checkpoints of a training loop: model, optimizer, scheduler, random state, numbers; complete or not there."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from colossal_bcd.checkpoint.assembly import is_writer
from colossal_bcd.checkpoint.errors import CheckpointError, on_all_ranks
from colossal_bcd.checkpoint.files import (
    ASIDE,
    check_file,
    describe_file,
    read_json,
    remove_leftovers,
    sync,
    sync_folder,
    verify,
    write_json,
)
from colossal_bcd.checkpoint.load import Loading, check_path
from colossal_bcd.checkpoint.save import index_name
from colossal_bcd.checkpoint.trained import boosted_of
from colossal_bcd.engine.agreement import gathered
from colossal_bcd.engine.config import communication_device
from colossal_bcd.engine.failures import require_finite, says_where

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
RANDOM_STATE = "random.safetensors"
FORMAT = "colossal_bcd checkpoint"
VERSION = 1
STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on."""

    step: int
    """Number of steps that `save` was given."""
    extra: dict[str, Any]
    """Numbers, strings and lists of the loop that `save` was given."""


class Booster(Protocol):
    """The methods of ColossalAI's `Booster` that are called here."""

    save_model: Callable[..., None]
    save_optimizer: Callable[..., None]
    save_lr_scheduler: Callable[..., None]
    load_model: Callable[..., Any]
    load_optimizer: Callable[..., Any]
    load_lr_scheduler: Callable[..., Any]


class CheckpointFolder:
    """Checkpoints of a run, each in a folder `step-...` with a manifest of sizes and checksums.

    A checkpoint is written under another name, synced and renamed: what is called `step-...` is complete, whenever the
    run was killed.  All ranks call the methods, on a file system that they share.

    Args:
        path: the folder; made when something is saved.
        keep_last: number of checkpoints that stay; None: all.
    Raises:
        ValueError: `keep_last` is below 1.
    """

    def __init__(self, path: str | Path, keep_last: int | None = None) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last: got {keep_last}, expected None or at least 1")
        self.path, self.keep_last = Path(path), keep_last

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        found = (STEP.fullmatch(path.name) for path in self.path.iterdir()) if self.path.is_dir() else ()
        return sorted(int(match[1]) for match in found if match and (self.path / match[0] / MANIFEST).is_file())

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.path / f"step-{step:08}"

    @says_where("save of the checkpoint")
    def save(
        self,
        booster: Booster,
        model: Any,
        optimizer: Any,
        lr_scheduler: Any = None,
        *,
        step: int,
        extra: Mapping[str, Any] | None = None,
        size_per_shard: int = 1024,
    ) -> None:
        """Write a checkpoint; one of the same step is replaced, and those beyond `keep_last` are deleted.

        Args:
            booster: its `boost` made the model, the optimizer and the scheduler.
            model: the boosted model.
            optimizer: the boosted optimizer.
            lr_scheduler: the boosted scheduler, if there is one.
            step: number of steps taken.
            extra: numbers, strings and lists of the loop, such as the position in the data; the same on every rank.
            size_per_shard: MiB of tensors in one file.
        Raises:
            CheckpointError: on every rank, such as when the disk is full; the earlier checkpoints stay.
            FloatingPointError: on every rank, if the last gradients were not finite.
        """
        require_finite(optimizer)
        aside = self.path / f"{ASIDE}{self.folder(step).name}"
        with on_all_ranks():
            if is_writer():
                self.path.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.path)
                aside.mkdir()
        try:
            booster.save_model(
                model, str(aside / "model"), shard=True, size_per_shard=size_per_shard, use_safetensors=True
            )
            booster.save_optimizer(optimizer, str(aside / "optimizer"), shard=True, size_per_shard=size_per_shard)
            if lr_scheduler is not None:
                booster.save_lr_scheduler(lr_scheduler, str(aside / "lr_scheduler.pt"))
            save_random_state(aside)
            with on_all_ranks():
                if is_writer():
                    self._publish(aside, step, dict(extra or {}))
        except CheckpointError:
            # All ranks are here.
            if is_writer():
                shutil.rmtree(aside, ignore_errors=True)
            raise

    @says_where("load of the checkpoint")
    def peek(self, step: int | None = None) -> Resumed | None:
        """What `load` would return, read from the manifest alone.

        Raises:
            CheckpointError: on every rank, if a file is missing or damaged.
        """
        manifest = self._manifest(step)
        return None if manifest is None else Resumed(step=manifest["step"], extra=manifest["extra"])

    @says_where("load of the checkpoint")
    def load(
        self, booster: Booster, model: Any, optimizer: Any, lr_scheduler: Any = None, *, step: int | None = None
    ) -> Resumed | None:
        """Go on where a checkpoint was saved, on any mesh.

        Args:
            booster: as `save` was given it, and so are the next three.
            model: the boosted model.
            optimizer: the boosted optimizer.
            lr_scheduler: the boosted scheduler, if there is one.
            step: step of the checkpoint; None: the newest.
        Returns:
            Where that is; None if there is no checkpoint.
        Raises:
            CheckpointError: on every rank, with the name of the file that is missing, damaged or foreign; nothing was
                changed then.
        """
        manifest = self._manifest(step, files=True)
        if manifest is None:
            return None
        folder = self.folder(manifest["step"])
        # The optimizer's own index has the checksums of its tensors, which are compared when it is loaded.
        apart = {name for name in manifest["files"] if name.startswith("optimizer/") and name.endswith(".safetensors")}
        verify(folder, {name: said for name, said in manifest["files"].items() if name not in apart})
        boosted = boosted_of(optimizer)
        ready: Loading | None = None
        if boosted is not None:
            ready = check_path(boosted, folder / "optimizer", index_name(None))
        booster.load_model(model, str(folder / "model"))
        if ready is not None:
            ready.apply()
        else:
            booster.load_optimizer(optimizer, str(folder / "optimizer"))
        if lr_scheduler is not None:
            booster.load_lr_scheduler(lr_scheduler, str(folder / "lr_scheduler.pt"))
        load_random_state(folder)
        return Resumed(step=manifest["step"], extra=manifest["extra"])

    def _manifest(self, step: int | None, *, files: bool = False) -> dict[str, Any] | None:
        """The manifest of a step or the newest, on all ranks; None: there is none.  With `files` these are there."""
        with on_all_ranks() as same:
            step = self.latest if step is None else step
            same("CheckpointFolder", "no checkpoint" if step is None else f"that of step {step}")
            if step is None:
                return None
            folder = self.folder(step)
            if not folder.is_dir():
                raise CheckpointError(f"checkpoint {folder} is missing, expected one of the steps {self.steps()}")
            manifest = read_json(folder / MANIFEST)
            if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
                raise CheckpointError(
                    f"checkpoint file {folder / MANIFEST}: got format {manifest.get('format')!r}, version "
                    f"{manifest.get('version')!r}, expected {FORMAT!r}, version {VERSION}"
                )
            for name, said in manifest["files"].items() if files else ():
                check_file(folder / name, said, contents=False)
            return manifest

    def _publish(self, aside: Path, step: int, extra: dict[str, Any]) -> None:
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        for path in files:
            with path.open("rb") as file:
                sync(file)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "extra": extra,
            "files": {str(path.relative_to(aside)): describe_file(path) for path in files},
        }
        write_json(aside / MANIFEST, manifest)
        for folder in (path for path in aside.rglob("*") if path.is_dir()):
            sync_folder(folder)
        final = self.folder(step)
        if final.exists():
            final.replace(self.path / f"{ASIDE}replaced-{final.name}")
        aside.replace(final)
        sync_folder(self.path)
        if self.keep_last is not None:
            for old in self.steps()[: -self.keep_last]:
                # Renamed first: what is half deleted is no checkpoint.
                self.folder(old).replace(self.path / f"{ASIDE}deleted-{old}")
        remove_leftovers(self.path)


def save_random_state(folder: Path) -> None:
    """Write torch's random state of all ranks, for dropout, into one file; this package draws from seeds."""
    mine = {"cpu": torch.get_rng_state()}
    if communication_device().type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state()
    states = gathered(mine)
    with on_all_ranks():
        if is_writer():
            by_name = {f"{rank}.{name}": state for rank, each in enumerate(states) for name, state in each.items()}
            save_file(by_name, folder / RANDOM_STATE)


def load_random_state(folder: Path) -> None:
    """Go on with the saved random state, where as many ranks saved as load."""
    with on_all_ranks():
        states = load_file(folder / RANDOM_STATE)
    rank, ranks = dist.get_rank(), len({name.partition(".")[0] for name in states})
    if ranks != dist.get_world_size():
        logger.info(
            "%d ranks saved torch's random state and %d go on: it is left as it is", ranks, dist.get_world_size()
        )
        return
    torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and communication_device().type == "cuda":
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
