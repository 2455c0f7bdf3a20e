"""Whether processes that are to train replicas of a model have equal ones, before their first average."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from colossal_bcd.block.replicas import ReplicaClient
from colossal_bcd.engine.agreement import fingerprints_of, is_equal
from colossal_bcd.engine.forward_watch import PLUGINS

REMEDY = (
    "Seed before the model and the optimizer are made, load the same checkpoint everywhere, or wrap the model in "
    "torch's DistributedDataParallel, which copies the weights of the first process. Processes that are no replicas of "
    "each other are given data_group=None, or data_group=the process group of those that are."
)


def require_plain(names: Mapping[Parameter, str]) -> None:
    """Refuse parameters that other libraries have sharded.

    Raises:
        ValueError: one is a DTensor, or DeepSpeed's.
    """
    for param, name in names.items():
        if isinstance(param, DTensor) or hasattr(param, "ds_id") or hasattr(param, "_fqns"):
            raise ValueError(
                f"BlockOptimizer on several processes: parameter {name!r} is a {type(param).__name__} of which this "
                "process has a part, expected whole parameters on every process. Use torch's DDP instead of FSDP or "
                f"DeepSpeed's ZeRO-3, or {PLUGINS}, which shards what trains."
            )


def require_same_replicas(client: ReplicaClient, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare names, shapes, dtypes, bits of all weights, and what trains when: one small collective.

    Raises:
        ValueError: on every rank, what differs.
    """
    names = client.replica_names()
    shapes = [f"{name} {tuple(param.shape)} {param.dtype}" for param, name in names.items()]
    weights = fingerprints_of(list(names), device)
    plan = client.fingerprint()
    parts = _digest(shapes), _digest(plan), _digest(weights)
    if is_equal(list(parts), device, group):
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (shapes, plan, weights), group=group)
    first = everyone[0]
    different = [rank for rank, other in enumerate(everyone) if other != first]
    raise ValueError(
        f"replicas: {_difference(everyone[different[0]], first)} on ranks {different} and on rank 0, expected equal "
        f"replicas. {REMEDY}"
    )


def _difference(theirs: Any, first: Any) -> str:
    if theirs[0] != first[0]:
        got, expected = set(theirs[0]) - set(first[0]), set(first[0]) - set(theirs[0])
        return f"got other parameters ({sorted(got)[:3]} instead of {sorted(expected)[:3]})"
    if theirs[2] != first[2]:
        wrong = [name for name, a, b in zip(first[0], theirs[2], first[2], strict=True) if a != b]
        return f"got other weights in {len(wrong)} of {len(first[0])} parameters, such as {wrong[0].split()[0]!r},"
    return "got other blocks, or another schedule or progress in it,"


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 2
