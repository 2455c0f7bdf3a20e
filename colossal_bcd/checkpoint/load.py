"""Reading the state of a boosted optimizer: everything is checked, on all ranks, before anything is changed."""

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
from colossal_bcd.checkpoint.errors import CheckpointError, gathered, together
from colossal_bcd.checkpoint.files import verify
from colossal_bcd.checkpoint.foreign import ParameterList, adopt
from colossal_bcd.checkpoint.manifest import load_hyper, load_scaler
from colossal_bcd.checkpoint.opened import Checkpoint, open_checkpoint
from colossal_bcd.checkpoint.trained import Boosted, TrainedTensor
from colossal_bcd.checkpoint.values import MARK, load_shared, put_together, words_of
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import CHUNK, completed, num_chunks
from colossal_bcd.optim.state.filed import FiledTensor, allocate, filed_tensors, write
from colossal_bcd.sharding.regions import StackedRegion, chunks, elements


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the optimizer will hold when the checkpoint is loaded."""

    held: list[TrainedTensor]
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
    entries: dict[str, list[FiledTensor]]
    by_param: dict[str, dict[str, dict[str, Any]]]

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
            for held in [*boosted.held(), *target.waiting]:
                _load(boosted, self.checkpoint, held, self.entries[held.name], self.by_param.get(held.name, {}))
        if not isinstance(boosted.base, ShardedOptimizer):
            load_shared(boosted.base, manifest.get("shared", []))
        _load_parts(boosted, self.checkpoint)
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
        target = _target(boosted, opened.manifest) if isinstance(opened, Checkpoint) else Target(held=boosted.held())
        same("checkpoint", _summary(opened))
    roster = _roster(target.held)
    with together():
        checkpoint = opened if isinstance(opened, Checkpoint) else adopt(name, opened, boosted, roster)
        by_param = _states(checkpoint)
        _check_groups(boosted, checkpoint, roster)
        entries = {
            held.name: _check(boosted, checkpoint, held, by_param.get(held.name, {}))
            for held in [*target.held, *target.waiting]
        }
    return Loading(boosted=boosted, checkpoint=checkpoint, target=target, entries=entries, by_param=by_param)


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
        return Target(held=boosted.held())
    plan = trained.plan.resumed(saved, ranges_given=trained.ranges_given)
    held = boosted.held(trained.group_names(saved["num_steps"], plan))
    waiting = boosted.waiting(manifest.get("waiting", []))
    return Target(held=held, waiting=waiting, plan=plan, num_steps=saved["num_steps"])


def _summary(opened: Checkpoint | dict[str, Any]) -> str:
    """What tells checkpoints apart; ranks that loaded different ones would switch blocks at different steps."""
    if not isinstance(opened, Checkpoint):
        return f"a state of {len(opened['state'])} parameters"
    block = opened.manifest["block"]
    where = "" if block is None else f" after {block['num_steps']} steps"
    return f"one{where} (manifest {hashlib.sha256(json.dumps(opened.manifest).encode()).hexdigest()[:16]})"


def _roster(held: list[TrainedTensor]) -> ParameterList:
    """All parameters that any rank will train."""
    mine = [(one.group, one.key, one.name, one.layout.shape) for one in held]
    return sorted({row for rows in gathered(mine) for row in rows})


def _states(checkpoint: Checkpoint) -> dict[str, dict[str, dict[str, Any]]]:
    """Entries of the base optimizer's state and masters: parameter -> state -> what the manifest says."""
    states: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in checkpoint.entries.values():
        if entry["part"] is None:
            states.setdefault(entry["parameter"], {})[entry["state"]] = entry
    return states


def _check_groups(boosted: Boosted, checkpoint: Checkpoint, roster: ParameterList) -> None:
    saved = [sorted(group["parameters"]) for group in checkpoint.manifest["groups"]]
    ours = [sorted(name for number, _, name, _ in roster if number == i) for i in range(len(boosted.groups()))]
    if len(saved) != len(ours):
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: got {len(saved)} param groups, expected {len(ours)}. Make the optimizer "
            "with the groups of the run that saved it."
        )
    for index, (theirs, own) in enumerate(zip(saved, ours, strict=True)):
        if theirs != own:
            missing, more = sorted(set(own) - set(theirs))[:3], sorted(set(theirs) - set(own))[:3]
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: param group {index} lacks {missing} and has {more} instead, expected "
                f"the {len(own)} parameters that are trained here. It is of another model or other groups."
            )


def _check(
    boosted: Boosted, checkpoint: Checkpoint, held: TrainedTensor, saved: dict[str, dict[str, Any]]
) -> list[FiledTensor]:
    """The entries that are to be read for one parameter."""
    foreign = checkpoint.manifest.get("foreign", False)
    if (MASTER in saved) != held.has_master and not foreign:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: got {'a' if MASTER in saved else 'no'} float32 master of {held.name!r}, "
            f"expected {'one' if held.has_master else 'none'}, as its dtype here is {held.param.dtype}. Use the "
            "precision of the run that saved it."
        )
    if MASTER in saved:
        check_shape(checkpoint, held, MASTER, saved[MASTER], held.layout.shape)
    states = {name: entry for name, entry in saved.items() if name != MASTER}
    if not isinstance(boosted.base, ShardedOptimizer):
        _require_regions(checkpoint, held, states)
        return []
    if held.name not in checkpoint.manifest["numbers"]:
        return []
    group = dict(boosted.groups()[held.group])
    load_hyper(group, checkpoint.manifest["groups"][held.group]["hyper"])
    expected = filed_tensors(boosted.base, torch.empty(0, dtype=held.dtype), held.layout, group, key=held.key)
    for entry in expected:
        if entry.name in states:
            check_shape(checkpoint, held, entry.name, states[entry.name], entry.region.shape)
        elif entry.kept and (entry.mean_of is None or entry.mean_of not in states):
            raise CheckpointError(
                f"checkpoint {checkpoint.name} has no {entry.name!r} of parameter {held.name!r}, expected one of shape "
                f"{entry.region.shape}. It is of another optimizer."
            )
    unknown = sorted(set(states) - {entry.name for entry in expected})
    if unknown:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: got state {unknown[0]!r} of parameter {held.name!r}, which {boosted.rule} "
            "does not have. It is of another optimizer or other hyper-parameters."
        )
    return [entry for entry in expected if entry.kept]


def _go_on_in_block(boosted: Boosted, checkpoint: Checkpoint) -> None:
    """A fresh block optimizer has taken the steps that the foreign state of its block has."""
    steps = [int(numbers["step"]) for numbers in checkpoint.manifest["numbers"].values() if "step" in numbers]
    steps += [int(checkpoint.tensor(name)) for name in checkpoint.entries if name.endswith(".step")]
    if steps:
        boosted.trained.num_steps = max(steps) % boosted.trained.schedule.period


def _load(
    boosted: Boosted,
    checkpoint: Checkpoint,
    held: TrainedTensor,
    entries: list[FiledTensor],
    saved: dict[str, dict[str, Any]],
) -> None:
    tensor, base = boosted.tensor(held), boosted.base
    if MASTER in saved:
        cut = elements(held.layout)
        cut.write(tensor, cut.pick(checkpoint.tensor(f"{held.name}.{MASTER}")))
    numbers = checkpoint.manifest["numbers"].get(held.name)
    group = boosted.groups()[held.group]
    if not isinstance(base, ShardedOptimizer):
        base.state.pop(tensor, None)
        if numbers is not None:
            base.state[tensor] = _read_undeclared(base, checkpoint, held, tensor, saved)
        return
    if numbers is None:
        base.state.pop(tensor, None)
        return
    allocate(base, tensor, held.layout, group, held.key)
    state = base.state[tensor]
    state.update(numbers)
    for entry in entries:
        write(entry, state, entry.region.pick(_whole(checkpoint, held.name, entry)))


def _whole(checkpoint: Checkpoint, owner: str, entry: FiledTensor) -> Tensor:
    name = f"{owner}.{entry.name}"
    if name in checkpoint.entries:
        return checkpoint.tensor(name)
    return checkpoint.tensor(f"{owner}.{entry.mean_of}").mean(-1)


def _load_parts(boosted: Boosted, checkpoint: Checkpoint) -> None:
    here = {boosted.names[id(param)]: param for param in getattr(boosted.wrapper, "layouts", {})}
    for part, contributor in contributors_of(boosted).items():
        if part not in checkpoint.manifest["parts"]:
            continue
        numbers = checkpoint.manifest["part_numbers"].get(part, {})
        saved: dict[Parameter, list[str]] = {here[name]: [] for name in numbers if name in here}
        for said in checkpoint.entries.values():
            if said["part"] == part and said["parameter"] in here:
                saved[here[said["parameter"]]].append(said["state"].removeprefix(f"{part}."))
        contributor.load(checkpoint.manifest["parts"][part], saved)
        for param, state, entries in contributor.filed():
            name = boosted.names[id(param)]
            state.update(numbers.get(name, {}))
            for entry in entries:
                if entry.kept and name in numbers:
                    write(entry, state, entry.region.pick(_whole(checkpoint, f"{name}.{part}", entry)))


def _require_regions(checkpoint: Checkpoint, held: TrainedTensor, states: Mapping[str, dict[str, Any]]) -> None:
    """Check that the file has state for this rank's part of one parameter.

    Args:
        checkpoint: the file.
        held: the parameter.
        states: what the manifest says of its state, without the master.
    Raises:
        CheckpointError: shapes are others, or the state is of other parts of the parameter.
    """
    region = words_of(held.layout)
    for name, said in states.items():
        shape, whole, kind = tuple(said["shape"]), held.layout.shape, said["kind"]
        if kind == "elementwise":
            check_shape(checkpoint, held, name, said, whole)
        elif kind == "stacked":
            check_shape(checkpoint, held, name, said, shape[: max(len(shape) - len(whole), 0)] + whole)
        elif kind == "chunks":
            cut = chunks(held.layout, CHUNK)
            if cut is None:
                raise _other_parts(checkpoint, held, name, "the whole parameter", region)
            check_shape(checkpoint, held, name, said, shape[: max(len(shape) - len(cut.shape), 0)] + cut.shape)
        elif kind not in ("whole", "part"):
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: state {name!r} of parameter {held.name!r} is not one value for each of "
                "its values. It is of another optimizer."
            )
    regions: dict[str, list[str]] = {}
    for name in states:
        state, mark, of = name.partition(MARK)
        if mark:
            regions.setdefault(state, []).append(of)
    regions.update({"": list(checkpoint.manifest.get("own_numbers", {}).get(held.name, {}))})
    for state, saved in regions.items():
        if saved and region not in saved:
            raise _other_parts(checkpoint, held, state or "numbers", " and ".join(sorted(saved)[:2]), region)


def check_shape(
    checkpoint: Checkpoint, held: TrainedTensor, name: str, said: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    """Refuse a tensor of another shape.

    Raises:
        CheckpointError: the manifest says that it has another one.
    """
    if tuple(said["shape"]) != shape:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: {name!r} of parameter {held.name!r} has shape {tuple(said['shape'])}, "
            f"expected {shape}. It is of another model or other hyper-parameters."
        )


def _read_undeclared(
    optimizer: Optimizer,
    checkpoint: Checkpoint,
    held: TrainedTensor,
    tensor: Tensor,
    saved: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The state of one parameter, with the types with which it was saved.

    Args:
        optimizer: whose it will be.
        checkpoint: the file.
        held: the parameter.
        tensor: what the optimizer holds of it.
        saved: what the manifest says of its state.
    """
    region, group = words_of(held.layout), _group_of(optimizer, held)
    numbers = checkpoint.manifest["numbers"][held.name]
    numbers = checkpoint.manifest.get("own_numbers", {}).get(held.name, {}).get(region, numbers)
    tensors: dict[str, Tensor] = {}
    for full, said in saved.items():
        name, mark, of = full.partition(MARK)
        if full == MASTER or (mark and of != region):
            continue
        read = checkpoint.tensor(f"{held.name}.{full}")
        if said["kind"] in ("whole", "part"):
            # torch's optimizers keep the step on the host unless a captured graph counts it.
            on_device = name != "step" or group.get("capturable") or group.get("fused")
            tensors[name] = read.to(tensor.device if on_device else "cpu", copy=True)
            continue
        cut, shape = elements(held.layout), tuple(tensor.shape)
        if said["kind"] == "chunks":
            of_chunks = chunks(held.layout, CHUNK)
            assert of_chunks is not None
            cut, shape = of_chunks, (num_chunks(held.layout),)
        lead = tuple(said["shape"])[: len(said["shape"]) - len(cut.shape)]
        cut = StackedRegion.of(cut, lead)
        tensors[name] = torch.zeros(lead + shape, dtype=read.dtype, device=tensor.device)
        cut.write(tensors[name], cut.pick(read))
    return completed(optimizer, put_together(tensors, numbers), held.layout)


def _group_of(optimizer: Optimizer, held: TrainedTensor) -> Mapping[str, Any]:
    group: Mapping[str, Any] = optimizer.param_groups[held.group]
    return group


def _other_parts(checkpoint: Checkpoint, held: TrainedTensor, state: str, saved: str, region: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint.name}: {state!r} of parameter {held.name!r} is that of {saved}, and nothing says what "
        f"it is for another part, expected one of {region}. Load it under the plugin and on the number of ranks that "
        "saved it."
    )
