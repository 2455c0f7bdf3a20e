"""`install()`: casts and bindings of this package under ColossalAI's own plugins."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

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
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch.optim import Optimizer

from colossal_bcd.block.trained import is_plain
from colossal_bcd.booster.boosting import configured_by_stock
from colossal_bcd.booster.casts.registry import OPTIMIZERS, cast
from colossal_bcd.booster.checkpoint_io import checkpoint_io
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.distributed import (
    DistGaloreAwamW,
    DistributedAdaFactor,
    DistributedCAME,
    DistributedLamb,
    SetupDistributed,
)
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh

CALLERS: tuple[ModuleType, ...] = (
    colossalai_optimizers,
    hybrid_parallel_plugin,
    low_level_zero_plugin,
    moe_hybrid_parallel_plugin,
)
"""Modules in which ColossalAI looks its cast function up."""


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
    def configure_under_name(self: Any, model: Any, optimizer: Any = None, *args: Any, **kwargs: Any) -> Any:
        bound, sharded = functools.partial(configure, self), not isinstance(self, TorchDDPPlugin)
        return configured_by_stock(bound, model, optimizer, *args, sharded=sharded, **kwargs)

    plugin.configure = configure_under_name
    plugin.get_checkpoint_io = functools.wraps(get_io)(lambda self: checkpoint_io(get_io(self)))


def _table() -> dict[Any, Any]:
    """Optimizer -> ours, with the constructor that those who read ColossalAI's table call."""
    stock = colossalai_optimizers
    return {
        **{each.cls: each.cls for each in OPTIMIZERS.values()},
        **{cls: cls for cls in (DistributedLamb, DistributedAdaFactor, DistributedCAME, DistGaloreAwamW)},
        **dict.fromkeys((stock.Lamb, stock.DistributedLamb), DistributedLamb),
        **dict.fromkeys((stock.Adafactor, stock.DistributedAdaFactor), DistributedAdaFactor),
        **dict.fromkeys((stock.CAME, stock.DistributedCAME), DistributedCAME),
        **dict.fromkeys((stock.GaLoreAdamW8bit, stock.DistGaloreAwamW), DistGaloreAwamW),
    }


def cast_for_stock_plugin(optimizer: Any) -> Any:
    """What ColossalAI's plugins call instead of their own cast, before they shard anything; refuses blocks."""
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, OptimizerWrapper):
        return optimizer
    if not is_plain(optimizer):
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


class StockInterface(SetupDistributed, DistributedOptim):
    """What ColossalAI's plugins call of a distributed optimizer; mixed into those of this package."""


@functools.cache
def distributed_class(cls: Any) -> type[ShardedOptimizer[Any]]:
    """`cls` with ColossalAI's interface for distributed optimizers."""
    return type(cls.__name__, (StockInterface, cls), {"__doc__": cls.__doc__, "__module__": cls.__module__})


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
