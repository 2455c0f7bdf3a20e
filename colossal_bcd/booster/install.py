"""`install()`: casts and bindings of this package under ColossalAI's own plugins."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin import (
    HybridParallelPlugin,
    LowLevelZeroPlugin,
    TorchDDPPlugin,
    hybrid_parallel_plugin,
    low_level_zero_plugin,
    moe_hybrid_parallel_plugin,
)
from colossalai.interface import OptimizerWrapper
from colossalai.interface.optimizer import DistributedOptim
from colossalai.nn import optimizer as colossalai_optimizers
from colossalai.tensor.d_tensor import get_sharding_spec, is_distributed_tensor
from colossalai.tensor.d_tensor.api import is_customized_distributed_tensor
from colossalai.utils import get_current_device
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer
from colossal_bcd.booster.checkpoint import checkpoint_io
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.registry import cast, names_of
from colossal_bcd.compat import DistGaloreAwamW, DistributedAdaFactor, DistributedCAME, DistributedLamb
from colossal_bcd.optim import (
    CAME,
    Adafactor,
    AdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreSGD,
    GoLoreAdafactor,
    GoLoreAdamW,
    GoLoreAdamW8bit,
    GoLoreSGD,
    Lamb,
    ShardedOptimizer,
)
from colossal_bcd.sharding import Layout, Mesh, TensorSplit

CALLERS: tuple[ModuleType, ...] = (
    colossalai_optimizers,
    hybrid_parallel_plugin,
    low_level_zero_plugin,
    moe_hybrid_parallel_plugin,
)
"""Modules in which ColossalAI looks its cast function up."""

GALORE = (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreSGD,
    GoLoreAdafactor,
    GoLoreAdamW,
    GoLoreAdamW8bit,
    GoLoreSGD,
)


def install() -> None:
    """Let ColossalAI's own plugins cast to and bind the optimizers of this package; calling it again changes nothing.

    Replaced are ColossalAI's cast function, and entries of its table for those who read it.  Block coordinate descent
    needs the plugins of `colossal_bcd.booster` and raises under the stock ones.
    """
    for module in CALLERS:
        module.cast_to_distributed = cast_for_stock_plugin  # type: ignore[attr-defined]
    for source, cls in _table().items():
        colossalai_optimizers.optim2DistOptim[source] = distributed_class(cls)
    for plugin in (LowLevelZeroPlugin, HybridParallelPlugin, TorchDDPPlugin):
        _complete_checkpoints(plugin)
    if install_cpu_accelerator():
        LowLevelZeroOptimizer._sanity_checks = _check_on_cpu


def _complete_checkpoints(plugin: Any) -> None:
    """Give optimizers the names of their parameters, and the plugin this package's checkpoint io."""
    if hasattr(plugin, "_has_complete_checkpoints"):
        return
    plugin._has_complete_checkpoints = True
    configure, get_io = plugin.configure, plugin.get_checkpoint_io

    @functools.wraps(configure)
    def configure_named(self: Any, model: Any, optimizer: Any = None, *args: Any, **kwargs: Any) -> Any:
        names = names_of(model)
        boosted = configure(self, model, optimizer, *args, **kwargs)
        if isinstance(boosted[1], OptimizerWrapper) and not hasattr(boosted[1], "parameter_names"):
            boosted[1].parameter_names = names
        return boosted

    plugin.configure = configure_named
    plugin.get_checkpoint_io = functools.wraps(get_io)(lambda self: checkpoint_io(get_io(self)))


def _table() -> dict[Any, Any]:
    """Optimizer -> ours, with the constructor that those who read ColossalAI's table call."""
    stock = colossalai_optimizers
    return {
        **{cls: cls for cls in (AdamW, Lamb, Adafactor, CAME, *GALORE)},
        **{cls: cls for cls in (DistributedLamb, DistributedAdaFactor, DistributedCAME, DistGaloreAwamW)},
        **dict.fromkeys((stock.Lamb, stock.DistributedLamb), DistributedLamb),
        **dict.fromkeys((stock.Adafactor, stock.DistributedAdaFactor), DistributedAdaFactor),
        **dict.fromkeys((stock.CAME, stock.DistributedCAME), DistributedCAME),
        **dict.fromkeys((stock.GaLoreAdamW8bit, stock.DistGaloreAwamW), DistGaloreAwamW),
    }


def cast_for_stock_plugin(optimizer: Any) -> Any:
    """What ColossalAI's plugins call instead of their own cast, before they shard anything.

    Raises:
        ValueError: block coordinate descent, or what `cast` refuses.
    """
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, OptimizerWrapper):
        return optimizer
    if isinstance(optimizer, BlockOptimizer):
        raise ValueError(
            "BlockOptimizer under a plugin of colossalai.booster.plugin, expected one of colossal_bcd.booster: "
            "ColossalAI's own keep masters of everything. Change the plugin's import line."
        )
    optimizer = cast(optimizer)
    if isinstance(optimizer, ShardedOptimizer):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        # ColossalAI keeps no record of the global shapes; the layouts of this moment are one.
        optimizer.bind({param: Layout.whole(tuple(param.shape)) for param in params}, Mesh())
        if not isinstance(optimizer, StockInterface):
            cls: Any = type(optimizer)
            optimizer.__class__ = distributed_class(cls)
        assert isinstance(optimizer, StockInterface)
        optimizer.original_groups = list(optimizer.param_groups)
    return optimizer


class StockInterface(DistributedOptim):
    """What ColossalAI's plugins call of a distributed optimizer; mixed into those of this package."""

    original_groups: Sequence[dict[str, Any]] = ()
    """The param-group dicts before ColossalAI, which schedulers hold; a pipeline gets new ones from it."""

    def setup_distributed(
        self,
        tp_group: dist.ProcessGroup | None = None,
        dp_group: dist.ProcessGroup | None = None,
        shard_to_working_param: Mapping[int, Tensor] | None = None,
        padding_map: Mapping[int, int] | None = None,
        is_zero: bool = False,
    ) -> None:
        """Bind from what ColossalAI passes.

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
        for index, original in enumerate(self.original_groups):
            original.update(self.param_groups[index])
            self.param_groups[index] = original
        tp, data = _place(tp_group), _place(dp_group if is_zero else None)
        layouts = {}
        for index, (param, weight) in enumerate(_weights(self, shard_to_working_param or {}).items()):
            layouts[param] = _layout(index, param, weight, self._layouts[weight].shape, tp, data, is_zero)
        groups = {axis: group for axis, group in (("tp", tp_group), ("zero", dp_group)) if group is not None}
        self.bind(layouts, Mesh(groups, get_current_device()))


@functools.cache
def distributed_class(cls: Any) -> type[ShardedOptimizer]:
    """`cls` with ColossalAI's interface for distributed optimizers."""
    return type(cls.__name__, (cls, StockInterface), {"__doc__": cls.__doc__, "__module__": cls.__module__})


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _weights(optimizer: ShardedOptimizer, working: Mapping[int, Tensor]) -> dict[Tensor, Tensor]:
    """Weight of the model behind every tensor that ColossalAI has put into the param groups."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    known = optimizer._layouts
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
    index: int,
    param: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    tp: tuple[int, int],
    data: tuple[int, int],
    is_zero: bool,
) -> Layout:
    layout = _shard_layout(weight, shape, *tp)
    if layout.local_shape != tuple(weight.shape):
        raise ValueError(
            f"parameter {index}: a shard of {tuple(weight.shape)} does not follow from the global shape {shape} on "
            f"{tp[1]} tensor-parallel ranks. Use colossal_bcd.booster.HybridParallelPlugin."
        )
    # ColossalAI's ZeRO flattens masters on one data-parallel rank, too, and does not say so.
    if is_zero or tuple(param.shape) != layout.local_shape:
        layout = layout.sliced("zero", *data)
    if layout.local_shape != tuple(param.shape):
        raise ValueError(
            f"parameter {index}: a master of {tuple(param.shape)} is no part of a shard of {tuple(weight.shape)} on "
            f"{data[1]} data-parallel ranks: ColossalAI divides it over other ranks (of sequence or expert "
            "parallelism) than it passes on. Use the plugins of colossal_bcd.booster."
        )
    return layout


def _shard_layout(weight: Any, shape: tuple[int, ...], rank: int, size: int) -> Layout:
    if is_distributed_tensor(weight):
        divided = list(get_sharding_spec(weight).dim_partition_dict)
    else:
        divided = [dim for dim, length in enumerate(shape) if length != weight.shape[dim]]
    if len(divided) != 1:
        return Layout.whole(shape)
    (dim,) = divided
    sections = None
    if is_customized_distributed_tensor(weight) and size > 1:
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


def _check_on_cpu(self: LowLevelZeroOptimizer) -> None:
    """ColossalAI's check without its assertion that the device is no CPU (low_level_optim.py, `_sanity_checks`)."""
    for group in self.optim.param_groups:
        for param in group["params"]:
            if param.dtype != self._dtype and not getattr(param, "skip_zero_check", False):
                raise ValueError(
                    f"parameters have dtypes {param.dtype} and {self._dtype}, expected one. Cast the model."
                )
    # Overlap needs streams: with it ColossalAI calls `Tensor.record_stream`, which torch lacks for CPU tensors.
    self._overlap_communication = False
