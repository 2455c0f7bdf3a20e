"""What an optimizer of this package takes: parameters of real floating dtypes, and keys of param groups."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of parameters that can be trained."""


def require_real(owner: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that cannot be trained; frozen ones, such as packed 4-bit weights, may be of any dtype.

    Args:
        owner: what refuses, for the error.
        named: parameters with a name or a number.
    Raises:
        ValueError: one that requires a gradient is complex, or of 8-bit floats.
    """
    for name, param in named:
        if param.requires_grad and param.dtype not in TRAINABLE:
            complex_only = "Hold it as a real tensor (torch.view_as_real), which is what Adam does with it. "
            raise ValueError(
                f"{owner}: parameter {name} of shape {tuple(param.shape)} is {param.dtype}, expected float16, "
                f"bfloat16, float32 or float64. {complex_only if param.is_complex() else ''}Or freeze it."
            )


def members_with_names(param_group: Mapping[str, Any], first: int) -> list[tuple[str, Tensor]]:
    """The parameters of a group with their names, where the group has `param_names`, or their numbers from `first`."""
    params, names = list(param_group["params"]), list(param_group.get("param_names", ()))
    if len(names) != len(params):
        names = [f"number {first + index}" for index in range(len(params))]
    return list(zip(names, params, strict=True))


def require_keys(owner: str, param_group: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Refuse keys that look like a hyper-parameter and are none; others belong to the user and are kept.

    Raises:
        ValueError: a key is misspelt.
    """
    for key in param_group:
        meant = None if key in fields else _meant(key, fields)
        if meant is not None:
            raise ValueError(
                f"{owner} param group has {key!r}, which is no hyper-parameter; did you mean {meant!r}? The "
                f"hyper-parameters are {', '.join(fields)}."
            )


def _meant(key: str, fields: Sequence[str]) -> str | None:
    """The field for which a key was probably meant, if any.

    Nearly the same letters, the same ones in another order ("rnak"), the beginning of the field in up to three letters
    ("r", the shortest field wins), or the initials of the one in place of the other ("wd", "learning_rate").
    """
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.8)
    if close:
        return close[0]
    swapped = [field for field in fields if sorted(field) == sorted(key)]
    begun = sorted((field for field in fields if len(key) <= 3 and field.startswith(key)), key=len)
    short = [field for field in fields if _initials(field) == key or _initials(key) == field]
    return next(iter([*swapped, *begun, *short]), None)


def _initials(name: str) -> str:
    """Of a name of several words."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
