"""State that no optimizer of this package has declared: what is in it, and whether ranks agree about it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.checkpoint.errors import CheckpointError
from colossal_bcd.checkpoint.values import decode, encode, tensors_within
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout

MARK = "@"
"""Between the name of a state and the region whose it is, where ranks have different ones."""


def taken_apart(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of one parameter's state by name, those in lists and dicts too, and everything else as JSON can hold it.

    Raises:
        ValueError: something is of a type that a file cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            others[name] = encode(value, str(name), tensors)
    return tensors, others


def put_together(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> dict[str, Any]:
    """What `taken_apart` was given."""
    inner = {name for value in others.values() for name in tensors_within(value)}
    return {
        **{name: decode(value, tensors) for name, value in others.items()},
        **{name: tensor for name, tensor in tensors.items() if name not in inner},
    }


def region_of(layout: Layout) -> str:
    """Which part of a parameter a rank holds, in words; equal on ranks that hold the same."""
    words = []
    if layout.split is not None and layout.split.size > 1:
        words.append(f"shard {layout.split.rank} of {layout.split.size} along dim {layout.split.dim}")
    if layout.slice is not None:
        words.append(f"slice {layout.slice.rank} of {layout.slice.size} with {layout.slice.length} values")
    return ", ".join(words) or "all"


def digest_of(tensor: Tensor) -> str:
    """What tells tensors apart, bit for bit."""
    data: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def shared_state(optimizer: Optimizer) -> list[list[Any]]:
    """State under keys that are no tensors, such as a count of steps, as pairs that JSON can hold.

    Raises:
        ValueError: something is of a type that a file cannot hold.
    """
    if isinstance(optimizer, ShardedOptimizer):
        return []
    return [
        [encode(key, "key of the state"), encode(value, str(key))]
        for key, value in optimizer.state.items()
        if not isinstance(key, Tensor)
    ]


def load_shared(optimizer: Optimizer, shared: Iterable[list[Any]]) -> None:
    """Replace what `shared_state` returns."""
    for key in [key for key in optimizer.state if not isinstance(key, Tensor)]:
        del optimizer.state[key]
    devices = {param.device for group in optimizer.param_groups for param in group["params"]}
    for key, value in shared:
        optimizer.state[decode(key)] = decode(value, device=next(iter(devices), None))


def agreed(reports: Iterable[list[list[Any]]]) -> list[list[Any]]:
    """The shared state of all ranks; a rank without parameters may have none.

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
