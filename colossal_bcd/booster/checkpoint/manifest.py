"""What a checkpoint of an optimizer says in plain numbers and strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from colossal_bcd.block.snapshot import progress
from colossal_bcd.booster.checkpoint.errors import CheckpointError
from colossal_bcd.booster.checkpoint.files import DTYPES
from colossal_bcd.booster.checkpoint.held import Boosted
from colossal_bcd.booster.checkpoint.parts import contributors_of
from colossal_bcd.booster.checkpoint.plan import Plan, Whole

FORMAT = "colossal_bcd optimizer"
VERSION = 2
SCALER = ("_growth_step", "_hysteresis_step")
"""Counters of ColossalAI's dynamic loss scaler, beside the scale."""


def manifest_of(boosted: Boosted, plan: Plan) -> dict[str, Any]:
    """Everything but the tensors; `json` can hold it.

    Raises:
        CheckpointError: a param group holds something else than numbers, strings, lists of them.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "rule": boosted.rule,
        "groups": [
            {"hyper": hyper_of(group), "parameters": names}
            for group, names in zip(boosted.groups(), plan.groups, strict=True)
        ],
        "keys": plan.keys,
        "waiting": plan.waiting,
        "numbers": plan.numbers,
        "part_numbers": plan.part_numbers,
        "entries": {tensor.name: _entry(tensor) for tensor in plan.tensors},
        "block": None if boosted.block is None else progress(boosted.block),
        "parts": {name: part.numbers() for name, part in contributors_of(boosted).items()},
        "loss_scaler": _scaler(boosted.scaler),
    }
    try:
        json.dumps(manifest)
    except TypeError as error:
        raise CheckpointError(
            f"checkpoint of {boosted.rule}: its param groups or state hold more than plain numbers and tensors "
            f"({error}), expected nothing else. Take it out before saving."
        ) from error
    return manifest


def hyper_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group without its parameters; tensors of one value as numbers."""
    values = {name: value for name, value in group.items() if name != "params"}
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}


def load_hyper(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Put saved values into a group, in the types that it has: tuples stay tuples, tensors the same tensors."""
    for name, value in saved.items():
        present = group.get(name)
        if isinstance(present, Tensor):
            present.fill_(value)
        else:
            group[name] = tuple(value) if isinstance(value, list) and isinstance(present, tuple) else value


def load_scaler(scaler: Any, saved: Mapping[str, Any] | None) -> None:
    """Go on with the loss scale of the run that saved."""
    if scaler is None or saved is None:
        return
    scaler._scale.fill_(saved["_scale"])
    for name in SCALER:
        if hasattr(scaler, name) and name in saved:
            setattr(scaler, name, saved[name])


def _entry(tensor: Whole) -> dict[str, Any]:
    return {
        "parameter": tensor.parameter,
        "state": tensor.state,
        "part": tensor.part,
        "kind": tensor.kind,
        "dtype": DTYPES[tensor.dtype],
        "shape": list(tensor.shape),
    }


def _scaler(scaler: Any) -> dict[str, Any] | None:
    if scaler is None:
        return None
    counters = {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)}
    return {"_scale": scaler._scale.item(), **counters}
