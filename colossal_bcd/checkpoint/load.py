"""The state of a boosted optimizer on its way in: everything is checked, on all ranks, before anything is changed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.plan import Plan
from colossal_bcd.checkpoint.assembly import MASTER, WRITER
from colossal_bcd.checkpoint.errors import CheckpointError, on_all_ranks
from colossal_bcd.checkpoint.files import verify
from colossal_bcd.checkpoint.foreign import ParameterList, adopt
from colossal_bcd.checkpoint.manifest import load_hyper, load_scaler
from colossal_bcd.checkpoint.opened import Checkpoint, open_checkpoint
from colossal_bcd.checkpoint.trained import Boosted, TrainedTensor
from colossal_bcd.checkpoint.values import MARK, load_shared, put_together, words_of
from colossal_bcd.engine.agreement import gathered
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import CHUNK, completed, num_chunks
from colossal_bcd.optim.state.filed import FiledTensor, allocate, filed_tensors, write
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.regions import Region, StackedRegion, chunks, elements, whole

SAME_ON_ALL = ("whole", "part")
"""Kinds of undeclared state that are read as they are."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the optimizer will have when the checkpoint is loaded."""

    active: list[TrainedTensor]
    """What will train."""
    waiting: list[TrainedTensor] = field(default_factory=list)
    """What will keep masters and state until it trains again."""
    plan: Plan | None = None
    """By which a block optimizer goes on, after `num_steps`; None: it does not say."""
    num_steps: int = 0


class Loading:
    """A checkpoint that fits, on all ranks; nothing is changed before `apply`.

    Args:
        boosted: gets it.
        name: of a file, for errors.
        opened: what `open_checkpoint` has returned, the same on every rank.
    Raises:
        CheckpointError: on every rank, it does not fit.
    """

    def __init__(self, boosted: Boosted, name: str, opened: Checkpoint | dict[str, Any]) -> None:
        self._boosted, self._is_sharded = boosted, isinstance(boosted.base, ShardedOptimizer)
        with on_all_ranks() as same:
            self._target = _target(boosted, opened)
            same("checkpoint", _summary(opened))
        mine = [(each.group, each.key, each.name, each.layout.shape) for each in self._target.active]
        parameters = sorted({row for rows in gathered(mine) for row in rows})
        with on_all_ranks():
            self._checkpoint = opened if isinstance(opened, Checkpoint) else adopt(name, opened, boosted, parameters)
            self._manifest = self._checkpoint.manifest
            self._check_groups(parameters)
            # Declared state that is to be read, by parameter.
            self._filed = {each.name: self._check(each) for each in (*self._target.active, *self._target.waiting)}

    @torch.no_grad()
    def apply(self) -> None:
        """Put it into the optimizer."""
        boosted, manifest, target = self._boosted, self._manifest, self._target
        if target.plan is not None:
            boosted.trained.resume_at(target.num_steps, target.plan)
        elif not boosted.trained.plan.is_whole and boosted.trained.num_steps == 0:
            self._go_on_in_block()
        for group, saved in zip(boosted.groups(), manifest["groups"], strict=True):
            load_hyper(group, saved["hyper"])
        load_scaler(boosted.scaler, manifest["loss_scaler"])
        with boosted.taking(target.waiting):
            for trained in [*boosted.active(), *target.waiting]:
                self._load(trained)
        if not self._is_sharded:
            load_shared(boosted.base, manifest.get("shared", []))
        self._load_contributors()
        boosted.renew()

    def _check_groups(self, parameters: ParameterList) -> None:
        saved = [sorted(group["parameters"]) for group in self._manifest["groups"]]
        num_groups = len(self._boosted.groups())
        ours = [sorted(name for number, _, name, _ in parameters if number == i) for i in range(num_groups)]
        if len(saved) != len(ours):
            raise self._checkpoint.error(
                f"got {len(saved)} param groups, expected {len(ours)}. Make the optimizer "
                "with the groups of the run that saved it."
            )
        for index, (theirs, here) in enumerate(zip(saved, ours, strict=True)):
            if theirs != here:
                missing, more = sorted(set(here) - set(theirs))[:3], sorted(set(theirs) - set(here))[:3]
                raise self._checkpoint.error(
                    f"param group {index} lacks {missing} and has {more} instead, expected "
                    f"the {len(here)} parameters that are trained here. It is of another model or other groups."
                )

    def _check(self, trained: TrainedTensor) -> list[FiledTensor]:
        """Find the declared state that is to be read for one parameter."""
        checkpoint, boosted = self._checkpoint, self._boosted
        states = checkpoint.states_of(trained.name)
        if (MASTER in states) != trained.has_master and not self._manifest.get("foreign", False):
            raise checkpoint.error(
                f"got {'a' if MASTER in states else 'no'} float32 master of {trained.name!r}, "
                f"expected {'one' if trained.has_master else 'none'}, as its dtype here is {trained.param.dtype}. Use "
                "the precision of the run that saved it."
            )
        if MASTER in states:
            self._check_shape(trained, MASTER, states.pop(MASTER), trained.layout.shape)
        if not self._is_sharded:
            self._check_undeclared(trained, states)
            return []
        if trained.name not in self._manifest["numbers"]:
            return []
        group = dict(boosted.groups()[trained.group])
        load_hyper(group, self._manifest["groups"][trained.group]["hyper"])
        like = torch.empty(0, dtype=trained.dtype)
        expected = filed_tensors(boosted.base, like, trained.layout, group, key=trained.key)
        for filed in expected:
            if filed.name in states:
                self._check_shape(trained, filed.name, states[filed.name], filed.region.shape)
            elif filed.kept and (filed.mean_of is None or filed.mean_of not in states):
                raise checkpoint.error(
                    f"has no {filed.name!r} of parameter {trained.name!r}, expected one of shape "
                    f"{filed.region.shape}. It is of another optimizer."
                )
        unknown = sorted(set(states) - {filed.name for filed in expected})
        if unknown:
            raise checkpoint.error(
                f"got state {unknown[0]!r} of parameter {trained.name!r}, which {boosted.rule} "
                "does not have. It is of another optimizer or other hyper-parameters."
            )
        return [filed for filed in expected if filed.kept]

    def _check_undeclared(self, trained: TrainedTensor, states: dict[str, dict[str, Any]]) -> None:
        """Refuse state of other shapes, or of other regions of the parameter than this rank's."""
        here = words_of(trained.layout)
        regions = {"": list(self._manifest.get("own_numbers", {}).get(trained.name, {}))}
        for name, said in states.items():
            if said["kind"] not in (*SAME_ON_ALL, "elementwise", "stacked", "chunks"):
                raise self._checkpoint.error(
                    f"state {name!r} of parameter {trained.name!r} is not one value for each of "
                    "its values. It is of another optimizer."
                )
            region = _region(trained.layout, said)
            if region is None:
                raise self._elsewhere(trained, name, "the whole parameter")
            self._check_shape(trained, name, said, region.shape)
            state, mark, of = name.partition(MARK)
            if mark:
                regions.setdefault(state, []).append(of)
        for state, saved in regions.items():
            if saved and here not in saved:
                raise self._elsewhere(trained, state or "numbers", " and ".join(sorted(saved)[:2]))

    def _check_shape(self, trained: TrainedTensor, name: str, said: dict[str, Any], shape: tuple[int, ...]) -> None:
        if tuple(said["shape"]) != shape:
            raise self._checkpoint.error(
                f"{name!r} of parameter {trained.name!r} has shape {tuple(said['shape'])}, "
                f"expected {shape}. It is of another model or other hyper-parameters."
            )

    def _elsewhere(self, trained: TrainedTensor, state: str, saved: str) -> CheckpointError:
        return self._checkpoint.error(
            f"{state!r} of parameter {trained.name!r} is that of {saved}, and nothing says what it is for another "
            f"part, expected one of {words_of(trained.layout)}. Load it under the plugin and on the number of ranks "
            "that saved it."
        )

    def _go_on_in_block(self) -> None:
        """A fresh block optimizer has taken the steps that the foreign state of its block has."""
        checkpoint, trained = self._checkpoint, self._boosted.trained
        steps = [int(numbers["step"]) for numbers in self._manifest["numbers"].values() if "step" in numbers]
        steps += [int(checkpoint.tensor(name)) for name in checkpoint.index if name.endswith(".step")]
        if steps:
            trained.num_steps = max(steps) % trained.schedule.period

    def _load(self, trained: TrainedTensor) -> None:
        tensor, base = self._boosted.tensor(trained), self._boosted.base
        states = self._checkpoint.states_of(trained.name)
        if states.pop(MASTER, None) is not None:
            region = elements(trained.layout)
            region.write(tensor, self._checkpoint.pick(f"{trained.name}.{MASTER}", region))
        numbers = self._manifest["numbers"].get(trained.name)
        if numbers is None or not self._is_sharded:
            base.state.pop(tensor, None)
        if numbers is None:
            return
        if not isinstance(base, ShardedOptimizer):
            base.state[tensor] = self._read_undeclared(trained, tensor, states)
            return
        allocate(base, tensor, trained.layout, self._boosted.groups()[trained.group], trained.key)
        base.state[tensor].update(numbers)
        for filed in self._filed[trained.name]:
            self._write(trained.name, filed, base.state[tensor])

    def _write(self, owner: str, filed: FiledTensor, state: dict[str, Any]) -> None:
        name = f"{owner}.{filed.name}"
        if name in self._checkpoint.index:
            values = self._checkpoint.pick(name, filed.region)
        else:
            values = filed.region.pick(self._checkpoint.tensor(f"{owner}.{filed.mean_of}").mean(-1))
        write(filed, state, values)

    def _load_contributors(self) -> None:
        boosted, manifest = self._boosted, self._manifest
        here = {boosted.names[id(param)]: param for param in getattr(boosted.wrapper, "layouts", {})}
        for kind, contributor in boosted.contributors().items():
            if kind not in manifest["parts"]:
                continue
            numbers = manifest["part_numbers"].get(kind, {})
            saved: dict[Parameter, list[str]] = {here[name]: [] for name in numbers if name in here}
            for said in self._checkpoint.index.values():
                if said["part"] == kind and said["parameter"] in here:
                    saved[here[said["parameter"]]].append(said["state"].removeprefix(f"{kind}."))
            contributor.load(manifest["parts"][kind], saved)
            for param, state, files in contributor.filed():
                name = boosted.names[id(param)]
                state.update(numbers.get(name, {}))
                for filed in files:
                    if filed.kept and name in numbers:
                        self._write(f"{name}.{kind}", filed, state)

    def _read_undeclared(
        self, trained: TrainedTensor, tensor: Tensor, states: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Read the state of one parameter, with the types with which it was saved."""
        here, base = words_of(trained.layout), self._boosted.base
        group = base.param_groups[trained.group]
        numbers = self._manifest["numbers"][trained.name]
        numbers = self._manifest.get("own_numbers", {}).get(trained.name, {}).get(here, numbers)
        tensors: dict[str, Tensor] = {}
        for full, said in states.items():
            name, mark, of = full.partition(MARK)
            if mark and of != here:
                continue
            full_name = f"{trained.name}.{full}"
            if said["kind"] in SAME_ON_ALL:
                read = self._checkpoint.tensor(full_name)
                # torch's optimizers keep the step on the host unless a captured graph counts it.
                on_device = name != "step" or group.get("capturable") or group.get("fused")
                tensors[name] = read.to(tensor.device if on_device else "cpu", copy=True)
                continue
            region = _region(trained.layout, said)
            assert region is not None
            lead = region.lead if isinstance(region, StackedRegion) else ()
            shape = (num_chunks(tensor.numel()),) if said["kind"] == "chunks" else tuple(tensor.shape)
            values = self._checkpoint.pick(full_name, region)
            tensors[name] = torch.zeros(lead + shape, dtype=values.dtype, device=tensor.device)
            region.write(tensors[name], values)
        return completed(base, put_together(tensors, numbers), tensor, trained.layout)


def check_path(boosted: Boosted, path: Path, index: str) -> Loading:
    """Check a folder or a file, and that it fits; nothing is changed.

    Raises:
        CheckpointError: on every rank.
    """
    with on_all_ranks():
        opened = open_checkpoint(path, index, contents=dist.get_rank() == WRITER)
    if isinstance(opened, Checkpoint) and opened.folder is not None:
        verify(opened.folder, opened.manifest["files"])
    return Loading(boosted, str(path), opened)


def _target(boosted: Boosted, opened: Checkpoint | dict[str, Any]) -> Target:
    if not isinstance(opened, Checkpoint):
        return Target(active=boosted.active())
    manifest, trained = opened.manifest, boosted.trained
    saved = manifest["block"]
    if (saved is None) != trained.plan.is_whole:
        kinds = ["of a plain optimizer", "of a BlockOptimizer"]
        raise CheckpointError(
            f"load_optimizer: got a checkpoint {kinds[saved is not None]}, expected one "
            f"{kinds[not trained.plan.is_whole]}. Make the optimizer as in the run that saved it."
        )
    if manifest["rule"] != boosted.rule:
        raise CheckpointError(
            f"load_optimizer: got a checkpoint of {manifest['rule']}, expected one of {boosted.rule}. Make the "
            "optimizer as in the run that saved it."
        )
    if saved is None:
        return Target(active=boosted.active())
    plan = trained.plan.resumed(saved, ranges_given=trained.ranges_given)
    active = boosted.active(trained.group_names(saved["num_steps"], plan))
    waiting = boosted.waiting(manifest.get("waiting", []))
    return Target(active=active, waiting=waiting, plan=plan, num_steps=saved["num_steps"])


def _summary(opened: Checkpoint | dict[str, Any]) -> str:
    """What tells checkpoints apart; ranks that loaded different ones would switch blocks at different steps."""
    if not isinstance(opened, Checkpoint):
        return f"a state of {len(opened['state'])} parameters"
    block = opened.manifest["block"]
    where = "" if block is None else f" after {block['num_steps']} steps"
    return f"one{where} (manifest {hashlib.sha256(json.dumps(opened.manifest).encode()).hexdigest()[:16]})"


def _region(layout: Layout, said: dict[str, Any]) -> Region | None:
    """This rank's region of undeclared state by the manifest; None: its chunks are not those of the whole parameter."""
    shape, kind = tuple(said["shape"]), said["kind"]
    if kind in SAME_ON_ALL:
        return whole(shape)
    one = chunks(layout, CHUNK) if kind == "chunks" else elements(layout)
    if one is None or kind == "elementwise":
        return one
    return StackedRegion.of(one, shape[: max(len(shape) - len(one.shape), 0)])
