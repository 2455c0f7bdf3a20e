"""The state of a boosted optimizer on its way in: everything is checked, on all ranks, before anything is changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.plan import Plan
from colossal_bcd.checkpoint.assembly import MASTER, WRITER
from colossal_bcd.checkpoint.contributors import contributors_of
from colossal_bcd.checkpoint.errors import CheckpointError, together
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
from colossal_bcd.sharding.regions import StackedRegion, chunks, elements


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


@dataclass(frozen=True, kw_only=True)
class Loading:
    """A checkpoint that fits, on all ranks."""

    boosted: Boosted
    checkpoint: Checkpoint
    target: Target
    filed: dict[str, list[FiledTensor]]
    """Declared state that is to be read, by parameter."""
    said: dict[str, dict[str, dict[str, Any]]]
    """What the manifest says of masters and the base optimizer's state: parameter -> state -> shape and so on."""

    @torch.no_grad()
    def apply(self) -> None:
        """Put it into the optimizer."""
        boosted, manifest, target = self.boosted, self.checkpoint.manifest, self.target
        if target.plan is not None:
            boosted.trained.resume_at(target.num_steps, target.plan)
        elif not boosted.trained.plan.is_whole and boosted.trained.num_steps == 0:
            _go_on_in_block(boosted, self.checkpoint)
        for group, saved in zip(boosted.groups(), manifest["groups"], strict=True):
            load_hyper(group, saved["hyper"])
        load_scaler(boosted.scaler, manifest["loss_scaler"])
        with boosted.taking(target.waiting):
            for trained in [*boosted.active(), *target.waiting]:
                said = self.said.get(trained.name, {})
                _load(boosted, self.checkpoint, trained, self.filed[trained.name], said)
        if not isinstance(boosted.base, ShardedOptimizer):
            load_shared(boosted.base, manifest.get("shared", []))
        _load_contributors(boosted, self.checkpoint)
        boosted.renew()


def check_path(boosted: Boosted, path: Path, index: str) -> Loading:
    """Check a folder or a file, and that it fits; nothing is changed.

    Raises:
        CheckpointError: on every rank.
    """
    with together():
        opened = open_checkpoint(path, index, contents=dist.get_rank() == WRITER)
    if isinstance(opened, Checkpoint) and opened.folder is not None:
        verify(opened.folder, opened.manifest["files"])
    return check_opened(boosted, str(path), opened)


def check_opened(boosted: Boosted, name: str, opened: Checkpoint | dict[str, Any]) -> Loading:
    """Check what `open_checkpoint` has returned, the same on every rank."""
    with together() as same:
        target = (
            _target(boosted, opened.manifest) if isinstance(opened, Checkpoint) else Target(active=boosted.active())
        )
        same("checkpoint", _summary(opened))
    parameters = _parameters(target.active)
    with together():
        checkpoint = opened if isinstance(opened, Checkpoint) else adopt(name, opened, boosted, parameters)
        said: dict[str, dict[str, dict[str, Any]]] = {}
        for each in checkpoint.index.values():
            if each["part"] is None:
                said.setdefault(each["parameter"], {})[each["state"]] = each
        _check_groups(boosted, checkpoint, parameters)
        filed = {
            trained.name: _check(boosted, checkpoint, trained, said.get(trained.name, {}))
            for trained in [*target.active, *target.waiting]
        }
    return Loading(boosted=boosted, checkpoint=checkpoint, target=target, filed=filed, said=said)


def _target(boosted: Boosted, manifest: dict[str, Any]) -> Target:
    saved, trained = manifest["block"], boosted.trained
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


def _parameters(active: list[TrainedTensor]) -> ParameterList:
    """List all parameters that any rank will train."""
    mine = [(trained.group, trained.key, trained.name, trained.layout.shape) for trained in active]
    return sorted({row for rows in gathered(mine) for row in rows})


def _check_groups(boosted: Boosted, checkpoint: Checkpoint, parameters: ParameterList) -> None:
    saved = [sorted(group["parameters"]) for group in checkpoint.manifest["groups"]]
    ours = [sorted(name for number, _, name, _ in parameters if number == i) for i in range(len(boosted.groups()))]
    if len(saved) != len(ours):
        raise checkpoint.error(
            f"got {len(saved)} param groups, expected {len(ours)}. Make the optimizer "
            "with the groups of the run that saved it."
        )
    for index, (theirs, here) in enumerate(zip(saved, ours, strict=True)):
        if theirs != here:
            missing, more = sorted(set(here) - set(theirs))[:3], sorted(set(theirs) - set(here))[:3]
            raise checkpoint.error(
                f"param group {index} lacks {missing} and has {more} instead, expected "
                f"the {len(here)} parameters that are trained here. It is of another model or other groups."
            )


def _check(
    boosted: Boosted, checkpoint: Checkpoint, trained: TrainedTensor, saved: dict[str, dict[str, Any]]
) -> list[FiledTensor]:
    """Find the declared state that is to be read for one parameter."""
    foreign = checkpoint.manifest.get("foreign", False)
    if (MASTER in saved) != trained.has_master and not foreign:
        raise checkpoint.error(
            f"got {'a' if MASTER in saved else 'no'} float32 master of {trained.name!r}, "
            f"expected {'one' if trained.has_master else 'none'}, as its dtype here is {trained.param.dtype}. Use the "
            "precision of the run that saved it."
        )
    if MASTER in saved:
        _check_shape(checkpoint, trained, MASTER, saved[MASTER], trained.layout.shape)
    states = {name: said for name, said in saved.items() if name != MASTER}
    if not isinstance(boosted.base, ShardedOptimizer):
        _require_regions(checkpoint, trained, states)
        return []
    if trained.name not in checkpoint.manifest["numbers"]:
        return []
    group = dict(boosted.groups()[trained.group])
    load_hyper(group, checkpoint.manifest["groups"][trained.group]["hyper"])
    expected = filed_tensors(boosted.base, torch.empty(0, dtype=trained.dtype), trained.layout, group, key=trained.key)
    for filed in expected:
        if filed.name in states:
            _check_shape(checkpoint, trained, filed.name, states[filed.name], filed.region.shape)
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


def _go_on_in_block(boosted: Boosted, checkpoint: Checkpoint) -> None:
    """A fresh block optimizer has taken the steps that the foreign state of its block has."""
    steps = [int(numbers["step"]) for numbers in checkpoint.manifest["numbers"].values() if "step" in numbers]
    steps += [int(checkpoint.tensor(name)) for name in checkpoint.index if name.endswith(".step")]
    if steps:
        boosted.trained.num_steps = max(steps) % boosted.trained.schedule.period


def _load(
    boosted: Boosted,
    checkpoint: Checkpoint,
    trained: TrainedTensor,
    files: list[FiledTensor],
    saved: dict[str, dict[str, Any]],
) -> None:
    tensor, base = boosted.tensor(trained), boosted.base
    if MASTER in saved:
        region = elements(trained.layout)
        region.write(tensor, region.pick(checkpoint.tensor(f"{trained.name}.{MASTER}")))
    numbers = checkpoint.manifest["numbers"].get(trained.name)
    group = boosted.groups()[trained.group]
    if not isinstance(base, ShardedOptimizer):
        base.state.pop(tensor, None)
        if numbers is not None:
            base.state[tensor] = _read_undeclared(base, checkpoint, trained, tensor, saved)
        return
    if numbers is None:
        base.state.pop(tensor, None)
        return
    allocate(base, tensor, trained.layout, group, trained.key)
    state = base.state[tensor]
    state.update(numbers)
    for filed in files:
        write(filed, state, filed.region.pick(_full(checkpoint, trained.name, filed)))


def _full(checkpoint: Checkpoint, owner: str, filed: FiledTensor) -> Tensor:
    name = f"{owner}.{filed.name}"
    if name in checkpoint.index:
        return checkpoint.tensor(name)
    return checkpoint.tensor(f"{owner}.{filed.mean_of}").mean(-1)


def _load_contributors(boosted: Boosted, checkpoint: Checkpoint) -> None:
    here = {boosted.names[id(param)]: param for param in getattr(boosted.wrapper, "layouts", {})}
    for kind, contributor in contributors_of(boosted).items():
        if kind not in checkpoint.manifest["parts"]:
            continue
        numbers = checkpoint.manifest["part_numbers"].get(kind, {})
        saved: dict[Parameter, list[str]] = {here[name]: [] for name in numbers if name in here}
        for said in checkpoint.index.values():
            if said["part"] == kind and said["parameter"] in here:
                saved[here[said["parameter"]]].append(said["state"].removeprefix(f"{kind}."))
        contributor.load(checkpoint.manifest["parts"][kind], saved)
        for param, state, files in contributor.filed():
            name = boosted.names[id(param)]
            state.update(numbers.get(name, {}))
            for filed in files:
                if filed.kept and name in numbers:
                    write(filed, state, filed.region.pick(_full(checkpoint, f"{name}.{kind}", filed)))


def _require_regions(checkpoint: Checkpoint, trained: TrainedTensor, states: Mapping[str, dict[str, Any]]) -> None:
    """Check that the file has state for this rank's region of one parameter.

    Args:
        checkpoint: the file.
        trained: the parameter.
        states: what the manifest says of its state, without the master.
    Raises:
        CheckpointError: shapes are others, or the state is of other regions of the parameter.
    """
    here = words_of(trained.layout)
    for name, said in states.items():
        shape, whole, kind = tuple(said["shape"]), trained.layout.shape, said["kind"]
        if kind == "elementwise":
            _check_shape(checkpoint, trained, name, said, whole)
        elif kind == "stacked":
            _check_shape(checkpoint, trained, name, said, shape[: max(len(shape) - len(whole), 0)] + whole)
        elif kind == "chunks":
            region = chunks(trained.layout, CHUNK)
            if region is None:
                raise _elsewhere(checkpoint, trained, name, "the whole parameter", here)
            _check_shape(
                checkpoint, trained, name, said, shape[: max(len(shape) - len(region.shape), 0)] + region.shape
            )
        elif kind not in ("whole", "part"):
            raise checkpoint.error(
                f"state {name!r} of parameter {trained.name!r} is not one value for each of "
                "its values. It is of another optimizer."
            )
    regions: dict[str, list[str]] = {}
    for name in states:
        state, mark, of = name.partition(MARK)
        if mark:
            regions.setdefault(state, []).append(of)
    regions.update({"": list(checkpoint.manifest.get("own_numbers", {}).get(trained.name, {}))})
    for state, saved in regions.items():
        if saved and here not in saved:
            raise _elsewhere(checkpoint, trained, state or "numbers", " and ".join(sorted(saved)[:2]), here)


def _check_shape(
    checkpoint: Checkpoint, trained: TrainedTensor, name: str, said: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    """Refuse a tensor of another shape.

    Raises:
        CheckpointError: the manifest says that it has another one.
    """
    if tuple(said["shape"]) != shape:
        raise checkpoint.error(
            f"{name!r} of parameter {trained.name!r} has shape {tuple(said['shape'])}, "
            f"expected {shape}. It is of another model or other hyper-parameters."
        )


def _read_undeclared(
    optimizer: Optimizer,
    checkpoint: Checkpoint,
    trained: TrainedTensor,
    tensor: Tensor,
    saved: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Read the state of one parameter, with the types with which it was saved.

    Args:
        optimizer: gets the state.
        checkpoint: the file.
        trained: the parameter.
        tensor: the optimizer's tensor of it.
        saved: what the manifest says of its state.
    """
    here, group = words_of(trained.layout), optimizer.param_groups[trained.group]
    numbers = checkpoint.manifest["numbers"][trained.name]
    numbers = checkpoint.manifest.get("own_numbers", {}).get(trained.name, {}).get(here, numbers)
    tensors: dict[str, Tensor] = {}
    for full, said in saved.items():
        name, mark, of = full.partition(MARK)
        if full == MASTER or (mark and of != here):
            continue
        read = checkpoint.tensor(f"{trained.name}.{full}")
        if said["kind"] in ("whole", "part"):
            # torch's optimizers keep the step on the host unless a captured graph counts it.
            on_device = name != "step" or group.get("capturable") or group.get("fused")
            tensors[name] = read.to(tensor.device if on_device else "cpu", copy=True)
            continue
        region, shape = elements(trained.layout), tuple(tensor.shape)
        if said["kind"] == "chunks":
            of_chunks = chunks(trained.layout, CHUNK)
            assert of_chunks is not None
            region, shape = of_chunks, (num_chunks(trained.layout),)
        lead = tuple(said["shape"])[: len(said["shape"]) - len(region.shape)]
        region = StackedRegion.of(region, lead)
        tensors[name] = torch.zeros(lead + shape, dtype=read.dtype, device=tensor.device)
        region.write(tensors[name], region.pick(read))
    return completed(optimizer, put_together(tensors, numbers), trained.layout)


def _elsewhere(checkpoint: Checkpoint, trained: TrainedTensor, state: str, saved: str, here: str) -> CheckpointError:
    return checkpoint.error(
        f"{state!r} of parameter {trained.name!r} is that of {saved}, and nothing says what "
        f"it is for another part, expected one of {here}. Load it under the plugin and on the number of ranks that "
        "saved it."
    )
