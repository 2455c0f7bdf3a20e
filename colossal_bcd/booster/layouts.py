"""From what ColossalAI has noted at a model's weights to layouts; the one reader, which does not import ColossalAI.

A weight of shape [4, 6] with d_tensor's mark "dim 0 over tp", and one whose fused sections (q, k, v) carry none:

    rank 0  rows 0, 1           q0 k0 v0      its `shard_fn` says which indices it has: one run of each section
    rank 1  rows 2, 3           q1 k1 v1
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from colossal_bcd.sharding import Layout, TensorSplit


def shard_layouts(
    module: nn.Module,
    shapes: Mapping[int, tuple[int, ...]],
    tp_rank: int,
    tp_size: int,
    required: Collection[int] | None = None,
) -> dict[nn.Parameter, Layout]:
    """The tensor-parallel layout of each parameter that is in `shapes` and in `module`.

    Args:
        module: the model after ShardFormer.
        shapes: id of a parameter -> its global shape, taken before ShardFormer (which keeps the parameter objects).
        tp_rank: this rank in the tensor-parallel group.
        tp_size: number of ranks in it.
        required: ids of those that are to be trained (None: all), whose shards have to follow from the global shapes;
            others are left out where theirs do not.
    """
    layouts = {}
    for name, param in module.named_parameters():
        shape = tuple(shapes.get(id(param), ()))
        if id(param) not in shapes:
            continue
        layout = shard_layout(param, shape, tp_rank, tp_size)
        if layout.local_shape == tuple(param.shape):
            layouts[param] = layout
        elif required is None or id(param) in required:
            raise ValueError(
                f"parameter {name!r}: a shard of {tuple(param.shape)} does not follow from the global shape {shape} on "
                f"{tp_size} tensor-parallel ranks. Construct the optimizer from the parameters of the model that is "
                "boosted, before boosting."
            )
    return layouts


def shard_layout(weight: Any, shape: tuple[int, ...], rank: int, size: int) -> Layout:
    """Layout of this rank's part of a weight that ColossalAI has divided, or not; `shape` is without padding.

    Which dim is divided is read from d_tensor's mark, or, for fused weights, which carry none, from the shapes; a
    longer dim than the global one is padding.  Where the shard does not follow from the shape, the layout's is another.
    """
    if hasattr(weight, "dist_layout"):
        divided = list(weight.dist_layout.sharding_spec.dim_partition_dict)
    elif len(shape) == weight.dim():
        divided = [dim for dim, length in enumerate(shape) if length != weight.shape[dim]]
    else:
        divided = []
    if len(divided) != 1:
        return Layout.whole(shape)
    (dim,) = divided
    sections = _sections(weight, shape[dim], size)
    padded = weight.shape[dim] * size
    if padded < shape[dim]:
        return Layout.whole(shape)
    split = TensorSplit(
        axis="tp", dim=dim, rank=rank, size=size, sections=sections, padded=padded if padded != shape[dim] else None
    )
    return Layout(shape=shape, split=split)


def is_divided(weight: Any) -> bool:
    """Whether ColossalAI's d_tensor says that other ranks have other parts of this weight."""
    layout = getattr(weight, "dist_layout", None)
    return layout is not None and tuple(layout.global_shape) != tuple(weight.shape)


def global_shape(weight: Any, known: tuple[int, ...], index: int) -> tuple[int, ...]:
    """Shape of the whole weight without padding; `known` is its shape when the optimizer was made.

    Raises:
        ValueError: a fused weight was divided before the optimizer was made, of which ColossalAI notes no shape.
    """
    if tuple(weight.shape) != known:
        return known
    layout = getattr(weight, "dist_layout", None)
    if layout is not None:
        shape = list(layout.global_shape)
        if hasattr(weight, "_padding_dim"):
            shape[weight._padding_dim] = weight._origin_length
        return tuple(shape)
    if hasattr(weight, "shard_fn") and weight.shard_fn(torch.arange(weight.shape[-1])).shape[0] != weight.shape[-1]:
        raise ValueError(
            f"parameter {index}: a fused weight of shape {known} was divided before the optimizer was made, and its "
            "whole shape is not noted. Make the optimizer before the model is sharded, or use "
            "colossal_bcd.booster.HybridParallelPlugin."
        )
    return known


def _sections(weight: Any, length: int, size: int) -> tuple[int, ...] | None:
    """Lengths of the fused sections of a dim, of which all ranks have equally much; None: it is not fused."""
    if not (hasattr(weight, "shard_fn") and hasattr(weight, "gather_fn")) or size == 1:
        return None
    return runs(weight.shard_fn(torch.arange(length)), size)


def runs(indices: Tensor, size: int) -> tuple[int, ...]:
    """[n] indices along a dim that one of `size` ranks has, one run of each section, as lengths of whole sections."""
    breaks = (indices.diff() != 1).nonzero().view(-1) + 1
    return tuple(len(run) * size for run in indices.tensor_split(breaks))
