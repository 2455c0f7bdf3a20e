"""State dicts as ColossalAI's wrappers give them: in shards, into buffers that are kept."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.checkpoint.assembly import assembled
from colossal_bcd.checkpoint.save import plain_numbers, prepare_state, whole_state
from colossal_bcd.checkpoint.trained import Boosted
from colossal_bcd.engine.config import communication_device

Pinned = MutableMapping[int, dict[str, Tensor]]
"""Number of a parameter -> name of an entry -> buffer on the CPU, pinned where there is a device to copy from."""

MIB = 2**20


def pinned_state(boosted: Boosted, pinned: Pinned | None, *, everywhere: bool) -> dict[str, Any]:
    """`whole_state`, in the buffers of `pinned` if they are given."""
    state = whole_state(boosted, everywhere=everywhere)
    for key in state["manifest"]["keys"].values():
        entries = state["state"].get(key, {})
        if entries:
            state["state"][key] = {name: _held(pinned, key, name, value) for name, value in entries.items()}
    return state


def state_shards(
    boosted: Boosted, limit: float, *, everywhere: bool, pinned: Pinned | None
) -> Iterator[tuple[dict[int, dict[str, Any]], float]]:
    """State by number, of at most `limit` MiB of tensors at a time or of one parameter; and those MiB."""
    own, plan, _ = prepare_state(boosted)
    sizes = dict.fromkeys(plan.keys, 0.0)
    for tensor in plan.tensors:
        if tensor.in_state and tensor.state != "step":
            sizes[tensor.parameter] += tensor.num_bytes / MIB
    shard: dict[int, dict[str, Any]] = {}
    filled, current = 0.0, None
    numbered = {name: plain_numbers(numbers) for name, numbers in plan.numbers.items()}
    for tensor, values in assembled(plan, own, everywhere=everywhere):
        if not tensor.in_state:
            continue
        name, key = tensor.parameter, plan.keys[tensor.parameter]
        if name != current:
            current = name
            if shard and filled + sizes[name] > limit:
                yield shard, filled
                shard, filled = {}, 0.0
            shard[key] = numbered.pop(name, {})
            filled += sizes[name]
        if values is not None:
            shard[key][tensor.state] = _held(pinned, key, tensor.state, values)
    shard.update({plan.keys[name]: numbers for name, numbers in numbered.items()})
    yield shard, filled


def _held(pinned: Pinned | None, key: int, name: str, value: Any) -> Any:
    if pinned is None or not isinstance(value, Tensor):
        return value
    buffers = pinned.setdefault(key, {})
    if name not in buffers:
        # Memory is pinned for a device, and a host has none.
        buffers[name] = torch.empty_like(value, device="cpu", pin_memory=communication_device().type == "cuda")
    return buffers[name].copy_(value)
