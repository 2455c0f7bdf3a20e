"""`install()`: casts and bindings of this package under ColossalAI's own plugins."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch.distributed as dist
from colossalai.booster.plugin import hybrid_parallel_plugin, low_level_zero_plugin, moe_hybrid_parallel_plugin
from colossalai.interface.optimizer import DistributedOptim
from colossalai.nn import optimizer as colossalai_optimizers
from colossalai.tensor.d_tensor import get_sharding_spec, is_distributed_tensor
from colossalai.tensor.d_tensor.api import is_customized_distributed_tensor
from colossalai.tensor.padded_tensor.api import is_padded_tensor
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.registry import CASTS, cast
from colossal_bcd.optim import AdamW, Lamb, ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh, TensorSplit

STOCK_PLUGINS: tuple[ModuleType, ...] = (hybrid_parallel_plugin, low_level_zero_plugin, moe_hybrid_parallel_plugin)


def install() -> None:
    """Let ColossalAI's own plugins cast to and bind the optimizers of this package; calling it again changes nothing.

    Replaced are ColossalAI's cast function where its plugins look it up, and the entries of its table.  Block
    coordinate descent needs the plugins of `colossal_bcd.booster` and raises under the stock ones.
    """
    for plugin in STOCK_PLUGINS:
        plugin.cast_to_distributed = cast_for_stock_plugin  # type: ignore[attr-defined]
    for name, (cls, _) in CASTS.items():
        source = getattr(colossalai_optimizers, name.rpartition(".")[2], None)
        if source is not None and name.startswith("colossalai."):
            colossalai_optimizers.optim2DistOptim[source] = distributed_class(cls)
    ours: list[Any] = [AdamW, Lamb]
    for cls in ours:
        colossalai_optimizers.optim2DistOptim[cls] = distributed_class(cls)
    if install_cpu_accelerator():
        LowLevelZeroOptimizer._sanity_checks = _same_dtype


@functools.cache
def distributed_class(cls: Any) -> type[ShardedOptimizer]:
    """`cls` with ColossalAI's interface for distributed optimizers."""

    def setup_distributed(
        self: ShardedOptimizer,
        tp_group: dist.ProcessGroup | None = None,
        dp_group: dist.ProcessGroup | None = None,
        shard_to_working_param: Mapping[int, Tensor] | None = None,
        padding_map: Mapping[int, int] | None = None,
        is_zero: bool = False,
    ) -> None:
        """Bind from what ColossalAI passes; padding follows from the working parameters, so its map is not needed."""
        params = [param for group in self.param_groups for param in group["params"]]
        self.bind(
            _layouts(params, tp_group, dp_group, shard_to_working_param or {}, is_zero), _mesh(tp_group, dp_group)
        )

    return type(cls.__name__, (cls, DistributedOptim), {"setup_distributed": setup_distributed, "__doc__": cls.__doc__})


def cast_for_stock_plugin(optimizer: Optimizer | None) -> Optimizer | None:
    """What ColossalAI's plugins call instead of their own cast."""
    if optimizer is None:
        return None
    if isinstance(optimizer, BlockOptimizer):
        raise ValueError(
            "BlockOptimizer under a plugin of colossalai.booster.plugin, expected one of colossal_bcd.booster: "
            "ColossalAI's own keep masters of everything. Change the plugin's import line."
        )
    optimizer = cast(optimizer)
    if isinstance(optimizer, ShardedOptimizer) and not isinstance(optimizer, DistributedOptim):
        cls: Any = type(optimizer)
        optimizer.__class__ = distributed_class(cls)
    return optimizer


def _mesh(tp_group: dist.ProcessGroup | None, dp_group: dist.ProcessGroup | None) -> Mesh:
    groups = {"tp": tp_group, "zero": dp_group}
    return Mesh({axis: group for axis, group in groups.items() if group is not None})


def _layouts(
    params: list[Tensor],
    tp_group: dist.ProcessGroup | None,
    dp_group: dist.ProcessGroup | None,
    shard_to_working: Mapping[int, Tensor],
    is_zero: bool,
) -> dict[Tensor, Layout]:
    tp_rank, tp_size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    working = {param: shard_to_working.get(id(param), param) for param in params}
    marked = any(is_distributed_tensor(p) or is_customized_distributed_tensor(p) for p in working.values())
    if tp_size > 1 and params and not marked:
        raise ValueError(
            "ColossalAI's HybridParallelPlugin gave master weights without saying how tensor parallelism divides them "
            "(it does not at zero_stage=0 with bf16 or fp16, nor with one data-parallel rank). Use "
            "colossal_bcd.booster.HybridParallelPlugin."
        )
    layouts = {}
    for param, weight in working.items():
        layout = _shard_layout(weight, tp_rank, tp_size)
        if is_zero and dp_group is not None:
            layout = layout.sliced("zero", dist.get_rank(dp_group), dist.get_world_size(dp_group))
        layouts[param] = layout
    return layouts


def _shard_layout(weight: Any, tp_rank: int, tp_size: int) -> Layout:
    if is_distributed_tensor(weight):
        (dim,) = get_sharding_spec(weight).dim_partition_dict or (None,)
    elif is_customized_distributed_tensor(weight):
        # Fused weights of ColossalAI are divided along their output dim: the last one of a transposed matrix.
        dim = weight.dim() - 1
    else:
        dim = None
    shape = list(weight.shape)
    if dim is None or tp_size == 1:
        return Layout.whole(tuple(shape))
    padded = shape[dim] * tp_size
    shape[dim] = weight._origin_length if is_padded_tensor(weight) else padded
    split = TensorSplit(axis="tp", dim=dim, rank=tp_rank, size=tp_size, padded=padded if shape[dim] != padded else None)
    return Layout(shape=tuple(shape), split=split)


def _same_dtype(self: LowLevelZeroOptimizer) -> None:
    """ColossalAI's check without its assertion that the device is no CPU (low_level_optim.py, `_sanity_checks`)."""
    for group in self.optim.param_groups:
        for param in group["params"]:
            if param.dtype != self._dtype and not getattr(param, "skip_zero_check", False):
                raise ValueError(
                    f"parameters have dtypes {param.dtype} and {self._dtype}, expected one. Cast the model."
                )
