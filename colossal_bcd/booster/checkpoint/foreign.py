"""State dicts of torch's kind: of plain PyTorch optimizers, of badam's base optimizer, of ColossalAI's plugins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from colossal_bcd.booster.checkpoint.errors import CheckpointError
from colossal_bcd.booster.checkpoint.files import DTYPES
from colossal_bcd.booster.checkpoint.held import Boosted
from colossal_bcd.booster.checkpoint.manifest import FORMAT, VERSION
from colossal_bcd.booster.checkpoint.source import Checkpoint
from colossal_bcd.optim import ShardedOptimizer

HARMLESS = {"foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad", "decoupled_weight_decay"}
"""Options of torch's param groups that mean nothing here as long as they are off."""

Roster = list[tuple[int, int, str, tuple[int, ...]]]
"""Group, number, name and whole shape of every parameter that is trained now, on any rank, in order."""


def adopt(name: str, state_dict: dict[str, Any], boosted: Boosted, roster: Roster) -> Checkpoint:
    """A state dict as a checkpoint without masters; numbers of parameters count as in the param groups.

    Under block coordinate descent it is the base optimizer's state of the block that is active now, whose parameters
    are recognised by shape, in the order of the model.

    Raises:
        CheckpointError: it does not fit the parameters.
    """
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    names = _names(name, state_dict["state"], keys, boosted, roster)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for key, values in state_dict["state"].items():
        parameter = names[int(key)]
        numbers[parameter] = {}
        for state, value in values.items():
            if isinstance(value, Tensor) and not (state == "step" and isinstance(boosted.base, ShardedOptimizer)):
                full = f"{parameter}.{state}"
                tensors[full] = value
                entries[full] = {
                    "parameter": parameter,
                    "state": state,
                    "part": None,
                    "kind": "whole" if state == "step" else "elementwise",
                    "dtype": DTYPES[value.dtype],
                    "shape": list(value.shape),
                }
            else:
                numbers[parameter][state] = int(value) if state == "step" else value
    return Checkpoint(
        name,
        {
            "format": FORMAT,
            "version": VERSION,
            "foreign": True,
            "rule": boosted.rule,
            "groups": _groups(name, groups, boosted, roster),
            "waiting": [],
            "numbers": numbers,
            "entries": entries,
            "block": None,
            "parts": {},
            "loss_scaler": None,
        },
        tensors,
    )


def _names(
    name: str, state: dict[Any, dict[str, Any]], keys: list[int], boosted: Boosted, roster: Roster
) -> dict[int, str]:
    if len(keys) != len(roster):
        raise CheckpointError(
            f"checkpoint {name}: got the state of an optimizer over {len(keys)} parameters, expected {len(roster)}, "
            "those that are trained now. It is of another model, other param groups or another block."
        )
    shapes = {int(key): _shape(values) for key, values in state.items()}
    left = list(roster)
    names = {}
    for key in keys:
        shape = shapes.get(int(key))
        fits = [i for i, (*_, whole) in enumerate(left) if boosted.block is not None and shape in (None, whole)]
        place = fits[0] if fits else 0
        _, _, parameter, whole = left.pop(place)
        if shape is not None and shape != whole:
            raise CheckpointError(
                f"checkpoint {name}: got state of shape {shape} for parameter {parameter!r}, expected {whole}. It is "
                "of another model or of other param groups."
            )
        names[int(key)] = parameter
    return names


def _shape(values: dict[str, Any]) -> tuple[int, ...] | None:
    """Shape of the parameter to which a state belongs."""
    shapes = [tuple(value.shape) for state, value in values.items() if isinstance(value, Tensor) and state != "step"]
    return max(shapes, key=len) if shapes else None


def _groups(name: str, groups: list[dict[str, Any]], boosted: Boosted, roster: Roster) -> list[dict[str, Any]]:
    ours = boosted.groups()
    for group in groups:
        asked = [key for key in group if key in HARMLESS and key not in ours[0] and group[key]]
        if asked:
            raise CheckpointError(
                f"checkpoint {name}: got {asked[0]}={group[asked[0]]!r}, which {boosted.rule} of colossal_bcd cannot "
                "honour. Go on with the optimizer that saved it."
            )
    members = [[parameter for number, _, parameter, _ in roster if number == index] for index in range(len(ours))]
    if len(groups) != len(ours):
        # The original of block coordinate descent makes groups of its own, by decay.
        if boosted.block is None:
            raise CheckpointError(f"checkpoint {name}: got {len(groups)} param groups, expected {len(ours)}")
        return [{"hyper": {}, "parameters": names} for names in members]
    return [
        {"hyper": {key: value for key, value in group.items() if key in own and key != "params"}, "parameters": names}
        for group, own, names in zip(groups, ours, members, strict=True)
    ]
