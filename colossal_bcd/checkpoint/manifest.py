"""The index of a checkpoint: what it says of an optimizer in plain numbers and strings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.checkpoint.assembly import Assembly
from colossal_bcd.checkpoint.errors import CheckpointError
from colossal_bcd.checkpoint.files import DTYPES
from colossal_bcd.checkpoint.trained import Boosted
from colossal_bcd.checkpoint.values import UNTYPED, decode, encode, like

FORMAT = "colossal_bcd optimizer"
VERSION = 3
OLD_VERSIONS = (2,)
"""Versions that load, too: they have lists where there were tuples."""
SCALER = ("_growth_step", "_hysteresis_step")
"""Counters of ColossalAI's dynamic loss scaler, beside the scale."""


def manifest_of(boosted: Boosted, assembly: Assembly) -> dict[str, Any]:
    """Collect everything but the tensors, as JSON can hold it; raises CheckpointError where it cannot."""
    plan_of = boosted.trained.plan
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "rule": boosted.rule,
        "groups": [
            {"hyper": hyper_of(boosted.rule, group), "parameters": names}
            for group, names in zip(boosted.groups(), assembly.groups, strict=True)
        ],
        "keys": assembly.keys,
        "waiting": assembly.waiting,
        "numbers": assembly.numbers,
        "own_numbers": assembly.numbers_by_region,
        "shared": assembly.shared,
        "part_numbers": assembly.contributor_numbers,
        "entries": {
            tensor.name: said_of(
                tensor.parameter, tensor.state, tensor.kind, tensor.dtype, tensor.shape, tensor.contributor
            )
            for tensor in assembly.tensors
        },
        "block": None if plan_of.is_whole else plan_of.progress(boosted.trained.num_steps),
        "parts": {name: each.numbers() for name, each in boosted.contributors().items()},
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


def hyper_of(rule: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a param group without its parameters into what JSON can hold, with the types of its values."""
    try:
        return {name: encode(value, name) for name, value in group.items() if name != "params"}
    except ValueError as error:
        raise CheckpointError(f"checkpoint of {rule}: param group: {error}") from error


def load_hyper(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Put saved values into a group; a tensor that is there and fits stays the same tensor, as graphs need it to."""
    device = next((param.device for param in group["params"]), None)
    for name, value in saved.items():
        present, loaded = group.get(name), decode(value, device=device)
        if isinstance(value, dict) and UNTYPED in value:
            loaded = like(loaded, present)
        if isinstance(present, Tensor) and not isinstance(loaded, Tensor) and isinstance(loaded, (int, float)):
            present.fill_(loaded)
        elif isinstance(present, Tensor) and isinstance(loaded, Tensor) and present.shape == loaded.shape:
            present.copy_(loaded)
        else:
            group[name] = loaded


def upgraded(manifest: dict[str, Any]) -> dict[str, Any]:
    """Turn a manifest of an old version into one of this version."""
    if manifest["version"] == VERSION:
        return manifest

    def untyped(value: Any) -> Any:
        """Lists may have been tuples; a dict was a dict."""
        return {UNTYPED: value} if isinstance(value, list) else encode(value, "value of an old file")

    groups = [
        {**group, "hyper": {name: untyped(value) for name, value in group["hyper"].items()}}
        for group in manifest["groups"]
    ]
    return {**manifest, "version": VERSION, "groups": groups}


def load_scaler(scaler: Any, saved: Mapping[str, Any] | None) -> None:
    """Go on with the loss scale of the run that saved."""
    if scaler is None or saved is None:
        return
    scaler._scale.fill_(saved["_scale"])
    for name in SCALER:
        if hasattr(scaler, name) and name in saved:
            setattr(scaler, name, saved[name])


def said_of(
    parameter: str, state: str, kind: str, dtype: torch.dtype, shape: Sequence[int], contributor: str | None = None
) -> dict[str, Any]:
    """What a manifest says of one tensor."""
    return {
        "parameter": parameter,
        "state": state,
        "part": contributor,
        "kind": kind,
        "dtype": DTYPES[dtype],
        "shape": list(shape),
    }


def _scaler(scaler: Any) -> dict[str, Any] | None:
    if scaler is None:
        return None
    counters = {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)}
    return {"_scale": scaler._scale.item(), **counters}
