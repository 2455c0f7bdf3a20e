"""State dict of a block optimizer on one process: the base optimizer's, and where in which block it was taken."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.masters import LOW_PRECISION, LocalMasters
from colossal_bcd.block.schedule import Drawn, Schedule
from colossal_bcd.optim.state.filed import FiledTensor

if TYPE_CHECKING:
    from colossal_bcd.block.optimizer import BlockOptimizer


class Contributor(Protocol):
    """A part of a BlockOptimizer with state of its own, under a name in `optimizer.contributors`."""

    def filed(self) -> Iterable[tuple[Parameter, dict[str, Any], Sequence[FiledTensor]]]:
        """State of parameters.

        Returns:
            Working parameter, its state by name, and a description of every tensor in that; the rest of it are plain
            numbers.  Parameters and names are the same on every rank that holds the parameter.
        """

    def numbers(self) -> dict[str, Any]:
        """Plain numbers, strings, and lists and dicts of them; the same on every rank."""

    def load(self, numbers: Mapping[str, Any], saved: Mapping[Parameter, Sequence[str]]) -> None:
        """Take what `numbers` returned, and make room for state, which is then written into what `filed` gives.

        Args:
            numbers: see above.
            saved: parameters of this rank and the tensors that the file has of them.
        """


def progress(optimizer: BlockOptimizer) -> dict[str, Any]:
    """Where in which schedule the optimizer is; plain numbers, strings, lists."""
    where: dict[str, Any] = {"num_steps": optimizer.num_steps, "identity": optimizer.identity()}
    if optimizer.schedule.drawn:
        where["drawn"] = [[epoch, list(order)] for epoch, order in optimizer.schedule.drawn]
    return where


def schedule_of(optimizer: BlockOptimizer, saved: Mapping[str, Any]) -> Schedule:
    """The schedule with which a saved run goes on: the optimizer's own, with the ranges and draws of the run.

    Ranges that nobody chose follow from the mesh (one per pipeline stage); a run keeps those with which it began.

    Args:
        optimizer: that goes on.
        saved: what `progress` returned.
    Raises:
        ValueError: the run has other blocks or another schedule.
    """
    identity = saved["identity"]
    # As it comes out of a file, which has lists only.
    ours: dict[str, Any] = json.loads(json.dumps(optimizer.identity()))
    if not optimizer.ranges_given and ours["blocks"] == identity.get("blocks"):
        ours["ranges"] = identity.get("ranges")
    require_identity(ours, identity)
    ranges = tuple((start, stop) for start, stop in ours["ranges"])
    return dataclasses.replace(optimizer.schedule, ranges=ranges, drawn=_drawn(saved))


def _drawn(saved: Mapping[str, Any]) -> Drawn:
    return tuple((epoch, tuple(order)) for epoch, order in saved.get("drawn", ()))


def names_at(optimizer: BlockOptimizer, schedule: Schedule, num_steps: int) -> list[list[str]]:
    """`optimizer.group_names(num_steps)` by another schedule."""
    active = set(dataclasses.replace(optimizer.plan, schedule=schedule).active_names(num_steps))
    names = {param: name for name, param in optimizer.named_parameters.items() if name in active}
    return [[names[param] for param in members if param in names] for members in optimizer.members]


def resume(optimizer: BlockOptimizer, schedule: Schedule, num_steps: int) -> None:
    """Go on after `num_steps` applied steps of a schedule, with fresh masters and without state."""
    optimizer.plan = dataclasses.replace(optimizer.plan, schedule=schedule)
    optimizer.resume_at(num_steps)


def take_snapshot(optimizer: BlockOptimizer) -> dict[str, Any]:
    """State and hyper-parameters of the base optimizer, progress, identity of the blocks, float32 masters by name."""
    local = _local(optimizer)
    local.follow()
    tensors = local.tensors
    masters = {
        name: tensors[param].detach()
        for name, param in optimizer.named_parameters.items()
        if param in tensors and tensors[param] is not param
    }
    block = {
        **progress(optimizer),
        "groups": optimizer.group_names(optimizer.num_steps),
        "masters": masters,
    }
    if optimizer.corrector is not None:
        state = optimizer.corrector.state
        block["corrections"] = {name: state[p] for name, p in optimizer.named_parameters.items() if p in state}
    if optimizer.importance is not None:
        block["importance"] = optimizer.importance.numbers()
    block.update(_waiting(optimizer))
    if attributes := optimizer.base_attributes():
        block["attributes"] = attributes
    return {**optimizer.base_optimizer.state_dict(), "block": block}


def load_snapshot(optimizer: BlockOptimizer, snapshot: Mapping[str, Any]) -> None:
    """Check everything, then activate the block and load masters and state."""
    _local(optimizer)
    if "block" not in snapshot:
        raise ValueError(
            f"load_state_dict: got a state with {', '.join(map(repr, snapshot))}, expected also 'block'. It is not one "
            "of a BlockOptimizer; a plain optimizer's state cannot tell which block it belongs to."
        )
    block = snapshot["block"]
    require_identity(optimizer.identity(), block["identity"])
    schedule = dataclasses.replace(optimizer.schedule, drawn=_drawn(block))
    _check_groups(names_at(optimizer, schedule, block["num_steps"]), block["groups"])
    _check_masters(optimizer, block)
    resume(optimizer, schedule, block["num_steps"])
    if optimizer.importance is not None:
        optimizer.importance.load(block["importance"], {})
    tensors = _local(optimizer).tensors
    with torch.no_grad():
        for name, master in block["masters"].items():
            tensors[optimizer.named_parameters[name]].copy_(master)
    if optimizer.corrector is not None:
        optimizer.corrector.load({optimizer.named_parameters[name]: s for name, s in block["corrections"].items()})
    _load_waiting(optimizer, block)
    optimizer.load_base_state({key: value for key, value in snapshot.items() if key != "block"})
    optimizer.set_base_attributes(block.get("attributes", {}))


def _waiting(optimizer: BlockOptimizer) -> dict[str, Any]:
    """What waits for its parameter's turn: masters and state of kept ones, what rounding cut off others."""
    masters, states = _local(optimizer), optimizer.states_aside()
    named = optimizer.named_parameters.items()
    entries = {
        "aside_masters": {name: masters.aside[p].detach() for name, p in named if masters.aside.get(p, p) is not p},
        "aside_states": {name: dict(states[p]) for name, p in named if p in states},
        "residuals": {name: masters.residuals.of[p] for name, p in named if p in masters.residuals.of},
    }
    return {key: entry for key, entry in entries.items() if entry}


def _load_waiting(optimizer: BlockOptimizer, block: Mapping[str, Any]) -> None:
    masters, named = _local(optimizer), optimizer.named_parameters
    residuals = masters.residuals
    residuals.of = {
        named[name]: residuals.empty(named[name], tuple(value.shape)).copy_(value)
        for name, value in block.get("residuals", {}).items()
    }
    states = {named[name]: copy.deepcopy(state) for name, state in block.get("aside_states", {}).items()}
    optimizer.put_aside(states)
    saved = {named[name]: master.clone().requires_grad_() for name, master in block.get("aside_masters", {}).items()}
    masters.put_aside({param: saved.get(param, param) for param in {**states, **saved}})


def _local(optimizer: BlockOptimizer) -> LocalMasters:
    if not isinstance(optimizer.masters, LocalMasters):
        raise ValueError(
            "state dict of a BlockOptimizer: an engine holds the masters, and only parts of them. Save "
            "the model; a run starts at its first block."
        )
    return optimizer.masters


def require_identity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a state of other blocks or of another schedule.

    Args:
        ours: `BlockOptimizer.identity()` of the optimizer that loads.
        theirs: that of the one that saved.
    Raises:
        ValueError: they differ.
    """
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if not different:
        return
    if "blocks" in different:
        got, expected = [[name for name, _ in identity["blocks"]] for identity in (theirs, ours)]
        detail = f"blocks {got}, expected {expected}" if got != expected else f"the blocks {got} with other parameters"
    else:
        names = {"period": "switch_block_every", "mode": "switch_mode", "ranges": "block_ranges"}
        detail = "; ".join(
            f"{names.get(key, key)} {theirs.get(key)!r}, expected {ours.get(key)!r}" for key in different
        )
    raise ValueError(
        f"load_state_dict: got a state of {detail}. Make the BlockOptimizer with the arguments of the run that saved "
        "it."
    )


def _check_groups(ours: list[list[str]], theirs: list[list[str]]) -> None:
    if len(ours) != len(theirs):
        raise ValueError(
            f"load_state_dict: got a state of {len(theirs)} param groups, expected {len(ours)}. Make the base "
            "optimizer with the groups of the run that saved it."
        )
    for index, (expected, got) in enumerate(zip(ours, theirs, strict=True)):
        if expected != got:
            raise ValueError(
                f"load_state_dict: got a state with {got} active in param group {index}, expected {expected}. Make the "
                "base optimizer with the groups of the run that saved it, in the same order."
            )


def _check_masters(optimizer: BlockOptimizer, block: dict[str, Any]) -> None:
    masters: dict[str, Tensor] = block["masters"]
    active = {name: optimizer.named_parameters[name] for group in block["groups"] for name in group}
    ours = {name: tuple(param.shape) for name, param in active.items() if param.dtype in LOW_PRECISION}
    theirs = {name: tuple(master.shape) for name, master in masters.items()}
    if ours != theirs:
        name = sorted(dict(ours.items() ^ theirs.items()))[0]
        raise ValueError(
            f"load_state_dict: the state has a float32 master of shape {theirs.get(name)} for parameter {name!r}, "
            f"expected {ours.get(name)} (None: no master, as of a float32 parameter). Load into a model of the same "
            "shapes and dtype."
        )
