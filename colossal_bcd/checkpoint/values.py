"""State that nobody declared: its tensors, and values of any type in the JSON of a manifest.

What JSON lacks, or would return as another type, gets a tag.  Numbers, strings, None and lists are themselves; a tuple
is {"#tuple": [...]}, a dict {"#dict": [[key, value], ...]}.  Floats are written with all their digits, so that they
come back bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.checkpoint.errors import CheckpointError
from colossal_bcd.checkpoint.files import DTYPES
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout

PLAIN = (bool, int, float, str)
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
UNTYPED = "#untyped"
"""Tag of a list of an old file, which may have been a tuple."""
MARK = "@"
"""Stands between the name of a state and its region in words, where ranks have different ones."""


def encode(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """Turn a value of a param group or of an optimizer's state into what JSON can hold.

    Args:
        value: to be kept.
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
    """Undo `encode`, which has set these tensors apart; those that were written out come to `device`."""
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


def plain_values(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a manifest as `plainly` has them."""
    return {name: plainly(decode(value)) for name, value in saved.items()}


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


def taken_apart(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split one parameter's state into tensors by name, those in lists and dicts too, and the rest as JSON has it."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            others[name] = encode(value, str(name), tensors)
    return tensors, others


def put_together(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `taken_apart`."""
    inner = {name for value in others.values() for name in tensors_within(value)}
    return {
        **{name: decode(value, tensors) for name, value in others.items()},
        **{name: tensor for name, tensor in tensors.items() if name not in inner},
    }


def words_of(layout: Layout) -> str:
    """The region of a parameter that a rank has, in words; equal on ranks that have the same."""
    words = []
    if layout.split is not None and layout.split.size > 1:
        words.append(f"shard {layout.split.rank} of {layout.split.size} along dim {layout.split.dim}")
    if layout.slice is not None:
        words.append(f"slice {layout.slice.rank} of {layout.slice.size} with {layout.slice.length} values")
    return ", ".join(words) or "all"


def digest_of(tensor: Tensor) -> str:
    """Fingerprint of a tensor, bit for bit."""
    data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def shared_state(optimizer: Optimizer) -> list[list[Any]]:
    """Collect state under keys that are no tensors, such as a count of steps, as pairs that JSON can hold."""
    if isinstance(optimizer, ShardedOptimizer):
        return []
    return [
        [encode(key, "key of the state"), encode(value, str(key))]
        for key, value in optimizer.state.items()
        if not isinstance(key, Tensor)
    ]


def load_shared(optimizer: Optimizer, shared: Iterable[list[Any]]) -> None:
    """Put back what `shared_state` has returned."""
    for key in [key for key in optimizer.state if not isinstance(key, Tensor)]:
        del optimizer.state[key]
    devices = {param.device for group in optimizer.param_groups for param in group["params"]}
    for key, value in shared:
        optimizer.state[decode(key)] = decode(value, device=next(iter(devices), None))


def agreed(reports: Iterable[list[list[Any]]]) -> list[list[Any]]:
    """Merge the shared state of all ranks; a rank without parameters may have none.

    Raises:
        CheckpointError: ranks have different values, which no file can give back on another mesh.
    """
    found: dict[str, list[Any]] = {}
    for rank, shared in enumerate(reports):
        for key, value in shared:
            before = found.setdefault(repr(key), [key, value])
            if repr(before[1]) != repr(value):
                raise CheckpointError(
                    f"save_optimizer: state {decode(key)!r} is {decode(value)} on rank {rank} and "
                    f"{decode(before[1])} on a lower one, expected the same on all ranks, as it belongs to no "
                    "parameter. Its optimizer depends on the mesh and cannot be saved."
                )
    return list(found.values())


def _written(tensor: Tensor, where: str) -> list[Any]:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where!r}: got a tensor of {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    items = tensor.detach().reshape(-1).tolist()
    return [DTYPES[tensor.dtype], list(tensor.shape), items, tensor.device.type == "cpu"]
