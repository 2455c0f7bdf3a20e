"""Values of any type in the JSON of a manifest: what JSON lacks, or would return as another type, gets a tag.

Numbers, strings, None and lists are themselves; a tuple is {"#tuple": [...]}, a dict {"#dict": [[key, value], ...]}.
Floats are written with all their digits, so that they come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.checkpoint.files import DTYPES

PLAIN = (bool, int, float, str)
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
UNTYPED = "#untyped"
"""Tag of a list of an old file, which may have been a tuple."""


def encode(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A value as JSON can hold it.

    Args:
        value: what a param group or an optimizer's state holds.
        where: its name, for errors and for the tensors within.
        tensors: gets the tensors within under names that begin with `where`; None: their values are written out.
    Raises:
        ValueError: the value, or something within it, is of a type that a file cannot hold.
    """
    kind = type(value)
    if value is None or kind in PLAIN:
        return value
    if isinstance(value, Tensor):
        if tensors is None:
            return {"#values": _written(value, where)}
        tensors[where] = value.detach()
        return {"#tensor": where}
    if kind in (list, tuple, torch.Size):
        items = [encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return items if kind is list else {"#tuple" if kind is tuple else "#size": items}
    if kind is dict:
        pairs = [[encode(key, where), encode(item, f"{where}.{key}", tensors)] for key, item in value.items()]
        return {"#dict": pairs}
    if is_numpy(value) and isinstance(getattr(torch, value.dtype.name, None), torch.dtype):
        is_scalar = not hasattr(value, "__len__")
        items = [value.item()] if is_scalar else value.reshape(-1).tolist()
        return {"#numpy": [value.dtype.name, None if is_scalar else list(value.shape), items]}
    if kind is complex:
        return {"#complex": [value.real, value.imag]}
    if kind is torch.dtype:
        return {"#dtype": str(value).removeprefix("torch.")}
    raise ValueError(
        f"{where!r}: got a {kind.__module__}.{kind.__qualname__}, expected numbers, strings, None, tensors, numpy's "
        "numbers, or lists, tuples and dicts of them. Files hold nothing else: take it out before saving."
    )


def decode(value: Any, tensors: Mapping[str, Tensor] | None = None, device: torch.device | None = None) -> Any:
    """What `encode` was given; values that it has not made are as they are.

    Args:
        value: see above.
        tensors: by the names under which `encode` put them.
        device: for tensors whose values were written out; None: the CPU.
    """
    if isinstance(value, list):
        return [decode(item, tensors, device) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((tag, content),) = value.items()
    if tag == "#tensor":
        assert tensors is not None
        return tensors[content]
    if tag == "#values":
        dtype, shape, items, on_host = content
        return torch.tensor(items, dtype=DTYPE_OF[dtype], device=None if on_host else device).view(shape)
    if tag in ("#tuple", "#size"):
        items = [decode(item, tensors, device) for item in content]
        return tuple(items) if tag == "#tuple" else torch.Size(items)
    if tag == "#dict":
        return {decode(key): decode(item, tensors, device) for key, item in content}
    if tag == "#numpy":
        name, shape, items = content
        array = torch.tensor(items, dtype=getattr(torch, name)).numpy()
        return array[0] if shape is None else array.reshape(shape)
    if tag == "#complex":
        return complex(*content)
    if tag == "#dtype":
        return getattr(torch, content)
    return content if tag == UNTYPED else value


def plainly(value: Any) -> Any:
    """A decoded value that `torch.load(weights_only=True)` reads: numpy's as Python's, a complex number as a tensor."""
    if is_numpy(value):
        return value.tolist()
    if type(value) is complex:
        return torch.tensor(value, dtype=torch.complex128)
    if type(value) in (list, tuple):
        return type(value)(plainly(item) for item in value)
    return {plainly(key): plainly(item) for key, item in value.items()} if type(value) is dict else value


def is_numpy(value: Any) -> bool:
    """Whether a value is a number or an array of numpy, which is not imported for it."""
    return type(value).__module__ == "numpy" and hasattr(value, "dtype")


def tensors_within(value: Any) -> set[str]:
    """Names of the tensors that an encoded value refers to."""
    if isinstance(value, list):
        return {name for item in value for name in tensors_within(item)}
    if not isinstance(value, dict) or len(value) != 1:
        return set()
    ((tag, content),) = value.items()
    if tag == "#tensor":
        return {content}
    return tensors_within(content) if tag in ("#tuple", "#dict") else set()


def like(value: Any, present: Any) -> Any:
    """A value of an old file, whose lists may have been tuples: what a tuple is here, at any depth, becomes one."""
    if not isinstance(value, list) or not isinstance(present, (list, tuple)):
        return value
    items = [like(item, present[index] if index < len(present) else None) for index, item in enumerate(value)]
    return tuple(items) if isinstance(present, tuple) else items


def _written(tensor: Tensor, where: str) -> list[Any]:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where!r}: got a tensor of {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    items = tensor.detach().reshape(-1).tolist()
    return [DTYPES[tensor.dtype], list(tensor.shape), items, tensor.device.type == "cpu"]
