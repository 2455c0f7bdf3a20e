"""ColossalAI's call that tells a distributed optimizer what is divided over which ranks; without ColossalAI itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh, TensorSplit

RankOfSize = tuple[int, int]
"""This rank among those of an axis, and their number."""


class SetupDistributed:
    """Mixin of a `ShardedOptimizer` with ColossalAI's `setup_distributed`, to come before it in the order of bases."""

    original_groups: Sequence[dict[str, Any]] = ()
    """The param-group dicts before ColossalAI, which schedulers hold; a pipeline gets new ones from it."""

    def setup_distributed(
        self,
        tp_group: Any = None,
        dp_group: Any = None,
        shard_to_working_param: Mapping[int, Tensor] | None = None,
        padding_map: Mapping[int, int] | None = None,
        is_zero: bool = False,
    ) -> None:
        """Bind from what ColossalAI passes.

        Weights may have been divided before or after the optimizer was made; before, what ColossalAI's d_tensor has
        noted at them says how.

        Args:
            tp_group: ranks that divide weights, if any.
            dp_group: ranks that divide masters, if `is_zero`.
            shard_to_working_param: id of a master -> its weight, where ColossalAI says so.
            padding_map: not needed, it follows from the shapes.
            is_zero: masters are flat parts of the weights.
        Raises:
            ValueError: the part of a weight that a master is does not follow from these.
        """
        assert isinstance(self, ShardedOptimizer)
        if _is_bound(self, shard_to_working_param or {}):
            return
        for index, original in enumerate(self.original_groups):
            original.update(self.param_groups[index])
            self.param_groups[index] = original
        groups = {axis: group for axis, group in (("tp", tp_group), ("zero", dp_group)) if group is not None}
        places = Mesh(groups)
        tp = (places.rank("tp"), places.size("tp")) if "tp" in groups else (0, 1)
        data = (places.rank("zero"), places.size("zero")) if is_zero and "zero" in groups else (0, 1)
        layouts, device = {}, None
        for index, (param, weight) in enumerate(_weights(self, shard_to_working_param or {}).items()):
            shape = global_shape(weight, self._layouts[weight].shape, index)
            layouts[param] = _layout(index, param, weight, shape, tp, data, is_zero)
            device = weight.device if device is None else device
        # Masters may be offloaded, while the groups communicate where the weights are.
        self.bind(layouts, Mesh(groups, device))

    def _active(self) -> Any:
        """What the step updates; refuses shards of which nobody has said whose they are."""
        assert isinstance(self, ShardedOptimizer)
        for index, param in enumerate(param for group in self.param_groups for param in group["params"]):
            if is_divided(param) and self._layouts.get(param) == Layout.whole(tuple(param.shape)):
                raise ValueError(
                    f"{type(self).__name__}: parameter {index} of shape {tuple(param.shape)} is a shard, expected a "
                    "whole weight, or a call of setup_distributed(tp_group, ...) before the first step."
                )
        return super()._active()  # type: ignore[misc]


def is_divided(weight: Any) -> bool:
    """Whether ColossalAI's d_tensor says that other ranks hold other parts of this weight."""
    layout = getattr(weight, "dist_layout", None)
    return layout is not None and tuple(layout.global_shape) != tuple(weight.shape)


def global_shape(weight: Any, known: tuple[int, ...], index: int) -> tuple[int, ...]:
    """Shape of the whole weight without padding.

    Args:
        weight: whole, or a shard.
        known: its shape when the optimizer was made.
        index: of the weight, for errors.
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


def _is_bound(optimizer: ShardedOptimizer[Any], working: Mapping[int, Tensor]) -> bool:
    """Whether an engine of this package has made the masters, and said what they are."""
    masters = [param for group in optimizer.param_groups for param in group["params"]]
    known = optimizer.layouts
    return bool(working) and all(param in known and working.get(id(param), param) not in known for param in masters)


def _weights(optimizer: ShardedOptimizer[Any], working: Mapping[int, Tensor]) -> dict[Tensor, Tensor]:
    """Weight of the model behind every tensor that ColossalAI has put into the param groups."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    known = optimizer.layouts
    weights = {param: working.get(id(param), param) for param in params}
    if any(weight not in known for weight in weights.values()):
        # Stage 0, or one data-parallel rank: ColossalAI passes no map.  Its masters are in the order of the weights.
        trained = [param for param in known if param.requires_grad]
        if working or len(trained) != len(params):
            raise ValueError(
                f"setup_distributed: got {len(params)} masters for {len(trained)} weights without a map between them, "
                "expected the map, or one master for each weight. ColossalAI's HybridParallelPlugin gives neither with "
                "pipeline parallelism at zero_stage=0 or on one data-parallel rank; use "
                "colossal_bcd.booster.HybridParallelPlugin."
            )
        weights = dict(zip(params, trained, strict=True))
    return weights


def _layout(
    index: int, param: Tensor, weight: Tensor, shape: tuple[int, ...], tp: RankOfSize, data: RankOfSize, is_zero: bool
) -> Layout:
    if is_divided(weight) and tp[1] == 1:
        raise ValueError(
            f"setup_distributed: parameter {index} is a shard of {tuple(weight.shape)} of a weight of {shape}, got no "
            "tp_group, expected the ranks that hold the other shards. Pass tp_group."
        )
    layout = shard_layout(weight, shape, *tp)
    if layout.local_shape != tuple(weight.shape):
        raise ValueError(
            f"parameter {index}: a shard of {tuple(weight.shape)} does not follow from the global shape {shape} on "
            f"{tp[1]} tensor-parallel ranks. Pass setup_distributed the tp_group that divides it, or use "
            "colossal_bcd.booster.HybridParallelPlugin."
        )
    if tuple(param.shape) == layout.local_shape and not is_zero:
        return layout
    # ColossalAI's ZeRO flattens masters on one data-parallel rank, too, and does not say so.  This package's engine
    # cuts those of some optimizers by whole rows.
    for whole_rows in (False, True):
        part = layout.sliced("zero", *data, whole_rows=whole_rows)
        if part.local_shape == tuple(param.shape):
            return part
    raise ValueError(
        f"parameter {index}: a master of {tuple(param.shape)} is no part of a shard of {tuple(weight.shape)} on "
        f"{data[1]} data-parallel ranks: ColossalAI divides it over other ranks (of sequence or expert "
        "parallelism) than it passes on. Use the plugins of colossal_bcd.booster."
    )


def shard_layout(weight: Any, shape: tuple[int, ...], rank: int, size: int) -> Layout:
    """Layout of a weight that ColossalAI has divided, or not.

    Args:
        weight: of this rank.
        shape: of the whole weight without padding.
        rank: this one among the tensor-parallel ranks.
        size: their number.
    """
    if hasattr(weight, "dist_layout"):
        divided = list(weight.dist_layout.sharding_spec.dim_partition_dict)
    else:
        divided = [dim for dim, length in enumerate(shape) if length != weight.shape[dim]]
    if len(divided) != 1:
        return Layout.whole(shape)
    (dim,) = divided
    sections = None
    if hasattr(weight, "shard_fn") and hasattr(weight, "gather_fn") and size > 1:
        sections = _sections(weight.shard_fn(torch.arange(shape[dim])), size)
    padded = weight.shape[dim] * size
    split = TensorSplit(
        axis="tp",
        dim=dim,
        rank=rank,
        size=size,
        sections=sections,
        padded=padded if sections is None and padded != shape[dim] else None,
    )
    return Layout(shape=shape, split=split)


def _sections(held: Tensor, size: int) -> tuple[int, ...]:
    """Lengths of the fused sections of a dim.

    Args:
        held: [n] indices along the dim that this rank holds, one run of each section.
        size: number of ranks, which hold equally many of each.
    """
    breaks = (held.diff() != 1).nonzero().view(-1) + 1
    return tuple(len(run) * size for run in held.tensor_split(breaks))
