"""What a host decides for its engine, and the process groups of this rank by axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from colossal_bcd.sharding import Mesh

Groups = tuple[dist.ProcessGroup, ...]


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """How gradients of projected parameters (GaLore, GoLore) travel; other optimizers are not concerned."""

    reduce: bool = True
    """Between refreshes project a gradient in its backward hook, drop it, and reduce the low-rank one.  That is exact,
    and so done, without clipping; with `max_norm` only if `clip_by_image` is on, too: else whole ones are reduced."""
    clip_by_image: bool = False
    """Clip by a norm in which projected parameters count with the norm of their low-rank gradient, which trains
    them, instead of that of the whole gradient.  At a refresh the whole gradient counts."""
    gather: bool = False
    """Gather low-rank updates, too, instead of weights, and let every replica apply them, rounding with the same
    random bits.  Needs ZeRO and `master_weights=False`, and with 16-bit weights `rounding="stochastic"` of the
    optimizer; low-rank updates travel in bfloat16, which rounds an update by up to 2^-9 of itself."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What a plugin decides for its optimizer."""

    data_groups: Groups
    """The data-parallel group, or the groups whose product it is (extra_dp_size)."""
    zero_groups: Groups
    """Ranks that share masters and states: `data_groups` at stage 1 and 2, empty at stage 0."""
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    partition_grad: bool = False
    """Stage 2: gradients are sharded, too."""
    reduce_bucket_size: int = 12 * 2**20
    """Values in one gradient or weight collective."""
    communication_dtype: torch.dtype | None = None
    overlap_communication: bool = True
    overlap_allgather: bool = False
    cpu_offload: bool = False
    master_weights: bool = True
    max_norm: float = 0.0
    """Clip the global norm of the gradients of what is active; 0 does not."""
    low_rank: LowRankOptions = field(default_factory=LowRankOptions)
    """How gradients of projected parameters travel."""
    verbose: bool = False
    """Log every step that loss scaling skips."""
    keep_gradients: bool = False
    """Whether averages of a plain optimizer accumulate over steps until `zero_grad`, as ColossalAI's do; they then stay
    alive in the step, 2 bytes per parameter for bf16 weights, over the ZeRO ranks with `partition_grad`."""
    fp16: Mapping[str, float] | None = None
    """Arguments of the loss scaler; None is no loss scaling."""


@dataclass(frozen=True, kw_only=True)
class ReducerConfig:
    """How gradients are averaged."""

    groups: tuple[dist.ProcessGroup, ...]
    """The data-parallel group, or the groups whose product it is."""
    partition: bool
    """Keep only this rank's row (ZeRO stage 2) instead of the whole gradient."""
    bucket_size: int
    """Largest number of values in one collective; a larger parameter is a bucket of its own."""
    overlap: bool
    """Start a bucket's collective as soon as backward has filled it."""
    communication_dtype: torch.dtype | None = None
    """Dtype on the wire, of low-rank gradients, too; None is the gradient's."""
    whole_rows: bool = False
    """See `slice_length`; the same as the masters'."""
    votes: bool = False
    """Say in the first bucket of a pass whether this rank has `joining`; with no parameters in a bucket of its own."""
    device: torch.device | None = None
    """Where the groups communicate, for a bucket without parameters."""
    chunk: int = 1
    """See `slice_length`; the same as the masters'."""


def mesh_of(config: EngineConfig, device: torch.device) -> Mesh:
    """The process groups of this rank by axis; `data`: ranks with other batches, whether masters are sharded or not."""
    zero: Any = config.zero_groups
    if len(zero) > 1 and math.prod(map(dist.get_world_size, zero)) == dist.get_world_size():
        zero = dist.group.WORLD
    groups: dict[str, Any] = {"zero": zero, "data": config.data_groups}
    for axis, group in (("tp", config.tp_group), ("pp", config.pp_group)):
        groups[axis] = () if group is None else (group,)
    return Mesh(groups, device)


def communication_device() -> torch.device:
    """Device of the tensors that the default process group communicates: the CPU under gloo, else the accelerator."""
    kind = {"nccl": "cuda", "hccl": "npu", "xccl": "xpu"}.get(dist.get_backend())
    if kind is None:
        several = dist.get_backend() not in ("gloo", "mpi")
        kind = "cuda" if several and torch.cuda.is_available() else "cpu"
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, getattr(torch, kind).current_device())
