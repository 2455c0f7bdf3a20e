"""State dicts like torch's: those of plain PyTorch optimizers, of badam's base optimizer, of ColossalAI's plugins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from colossal_bcd.checkpoint.errors import CheckpointError
from colossal_bcd.checkpoint.manifest import FORMAT, VERSION, said_of
from colossal_bcd.checkpoint.opened import Checkpoint
from colossal_bcd.checkpoint.trained import Boosted
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import unwrapped
from colossal_bcd.optim.state.filed import constant_names, filed_tensors
from colossal_bcd.sharding import Layout

HARMLESS = {"foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad", "decoupled_weight_decay"}
"""Options of torch's param groups that mean nothing here as long as they are off."""

ParameterList = list[tuple[int, int, str, tuple[int, ...]]]
"""Group, number, name and full shape of every parameter that is trained now, on any rank, in order."""


def adopt(name: str, state_dict: dict[str, Any], boosted: Boosted, params: ParameterList) -> Checkpoint:
    """Turn a state dict into a checkpoint without masters; parameters are numbered as in the param groups.

    Under block coordinate descent it is the base optimizer's state of the block that is active now, whose parameters
    are recognised by shape, in the order of the model.

    Raises:
        CheckpointError: it does not fit the parameters.
    """
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    # ColossalAI's files have the numbers as strings.
    numbered = {key: number for number in keys for key in (number, str(number))}
    by_key = {numbered[key]: unwrapped(values) for key, values in state_dict["state"].items() if key in numbered}
    shared = [[key, value] for key, value in state_dict["state"].items() if key not in numbered]
    names = _names(name, by_key, keys, boosted, params)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    index: dict[str, dict[str, Any]] = {}
    shapes = {parameter: whole for _, _, parameter, whole in params}
    constant = constant_names((shapes[names[key]], values) for key, values in by_key.items())
    for key, values in by_key.items():
        parameter = names[key]
        numbers[parameter] = {}
        for state, value in values.items():
            if isinstance(value, Tensor) and not (state == "step" and isinstance(boosted.base, ShardedOptimizer)):
                full = f"{parameter}.{state}"
                tensors[full] = value
                kind = _kind(boosted, state, value, Layout.whole(shapes[parameter]), constant)
                index[full] = said_of(parameter, state, kind, value.dtype, value.shape)
            else:
                numbers[parameter][state] = int(value) if state == "step" else value
    return Checkpoint(
        name,
        {
            "format": FORMAT,
            "version": VERSION,
            "foreign": True,
            "rule": boosted.rule,
            "groups": _groups(name, groups, boosted, params),
            "waiting": [],
            "numbers": numbers,
            "entries": index,
            "shared": shared,
            "block": None,
            "parts": {},
            "loss_scaler": None,
        },
        tensors,
    )


def _kind(boosted: Boosted, state: str, value: Tensor, layout: Layout, constant: set[str]) -> str:
    if isinstance(boosted.base, ShardedOptimizer):
        return "whole" if state == "step" else "elementwise"
    (filed,) = filed_tensors(boosted.base, value, layout, {}, {state: value}, constant)
    return filed.kind


def _names(
    name: str, state: dict[Any, dict[str, Any]], keys: list[Any], boosted: Boosted, params: ParameterList
) -> dict[Any, str]:
    if len(keys) != len(params):
        raise CheckpointError(
            f"checkpoint {name}: got the state of an optimizer over {len(keys)} parameters, expected {len(params)}, "
            "those that are trained now. It is of another model, other param groups or another block."
        )
    # Among the shapes of a parameter's state should be its own.
    shapes = {
        key: [tuple(value.shape) for name, value in values.items() if isinstance(value, Tensor) and name != "step"]
        for key, values in state.items()
    }
    left = list(params)
    names = {}
    for key in keys:
        found = shapes.get(key, [])
        fits = [
            i
            for i, (*_, whole) in enumerate(left)
            if not boosted.trained.plan.is_whole and (not found or whole in found)
        ]
        _, _, parameter, whole = left.pop(fits[0] if fits else 0)
        if found and whole not in found:
            shape = max(found, key=len)
            raise CheckpointError(
                f"checkpoint {name}: got state of shape {shape} for parameter {parameter!r}, expected {whole}. It is "
                "of another model or of other param groups."
            )
        names[key] = parameter
    return names


def _groups(name: str, groups: list[dict[str, Any]], boosted: Boosted, params: ParameterList) -> list[dict[str, Any]]:
    ours = boosted.groups()
    for group in groups:
        asked = [key for key in group if key in HARMLESS and key not in ours[0] and group[key]]
        if asked:
            raise CheckpointError(
                f"checkpoint {name}: got {asked[0]}={group[asked[0]]!r}, which {boosted.rule} of colossal_bcd cannot "
                "honour. Go on with the optimizer that saved it."
            )
    members = [[parameter for number, _, parameter, _ in params if number == index] for index in range(len(ours))]
    if len(groups) != len(ours):
        # The original of block coordinate descent makes groups of its own, by decay.
        if boosted.trained.plan.is_whole:
            raise CheckpointError(f"checkpoint {name}: got {len(groups)} param groups, expected {len(ours)}")
        return [{"hyper": {}, "parameters": names} for names in members]
    return [
        {"hyper": {key: value for key, value in group.items() if key in here and key != "params"}, "parameters": names}
        for group, here, names in zip(groups, ours, members, strict=True)
    ]
