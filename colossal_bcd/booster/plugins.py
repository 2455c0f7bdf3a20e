"""Booster plugins: ColossalAI's, with optimizers cast, bound and block-aware.  Only the import line changes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.distributed as dist
from colossalai.booster.plugin import HybridParallelPlugin as StockHybridParallelPlugin
from colossalai.booster.plugin import LowLevelZeroPlugin as StockLowLevelZeroPlugin
from colossalai.booster.plugin import TorchDDPPlugin as StockTorchDDPPlugin
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPModel
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.utils import get_current_device
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.trained import is_plain, trained_of
from colossal_bcd.booster.adapters import LoraPlugin, adopt_adapters, has_adapters, refuse_adapters
from colossal_bcd.booster.arguments import (
    SCALER_ARGUMENTS,
    arguments_of,
    check_hybrid,
    check_zero,
    refuse_fp8,
    refuse_torch_reducer,
)
from colossal_bcd.booster.boosting import configured_by_stock, ready_to_boost, same_start, thawed
from colossal_bcd.booster.casts.registry import names_of, shapes_of
from colossal_bcd.booster.checkpoint_io import checkpoint_io
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.dropout import share_masks
from colossal_bcd.booster.layouts import shard_layouts
from colossal_bcd.booster.pipeline import HybridModule, keep_output_differentiable, plan_stages, tied_elsewhere
from colossal_bcd.booster.stock_surface import param_info_of
from colossal_bcd.booster.zero import ZeroOptimizer
from colossal_bcd.engine.config import EngineConfig, LowRankOptions
from colossal_bcd.engine.failures import keep_groups, limit_waiting, says_where
from colossal_bcd.engine.fitness import Given
from colossal_bcd.sharding import Layout

logger = logging.getLogger(__name__)

Boosted = tuple[nn.Module, Any, Any, Any, Any]


class EnginePlugin(LoraPlugin):
    """What the plugins of this package have in common; comes before ColossalAI's plugin in the order of bases."""

    tp_group: Any = None
    tp_size: int = 1

    def supported_devices(self) -> list[str]:
        stock: Any = super()
        return [*stock.supported_devices(), "cpu"]

    def get_checkpoint_io(self) -> Any:
        stock: Any = super()
        return checkpoint_io(stock.get_checkpoint_io())

    def configure(
        self,
        model: Any,
        optimizer: Any = None,
        criterion: Callable[..., Any] | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> Boosted:
        fresh = optimizer is not None and not isinstance(optimizer, OptimizerWrapper)
        if fresh:
            optimizer = ready_to_boost(model, optimizer, self._given())
        shapes, names = (shapes_of(model), names_of(model)) if fresh else ({}, {})
        info = param_info_of(optimizer) if fresh else {}
        # Weights that several stages of a pipeline share get groups of their own.
        with thawed(optimizer), limit_waiting():
            if not isinstance(model, ModelWrapper):
                model = self._wrap(model)
        if fresh:
            self._start_equal(model, is_plain(optimizer))
            module = model.unwrap(unwrap_peft=False)
            place = (0, 1) if self.tp_group is None else (dist.get_rank(self.tp_group), self.tp_size)
            ids = {id(param) for param in trained_of(optimizer).parameters()}
            layouts = shard_layouts(module, shapes, *place, ids)
            optimizer = self._engine(optimizer, model, layouts, names)
            optimizer.param_info = info
            model.update_master_params = MethodType(optimizer.update_master_params, model)
        return model, optimizer, criterion, dataloader, lr_scheduler

    def _given(self) -> Given:
        """What the engine gives an optimizer of each weight."""
        return "parts"

    def _wrap(self, model: nn.Module) -> Any:
        """The model in ColossalAI's wrapper."""
        raise NotImplementedError

    def _start_equal(self, model: Any, plain: bool) -> None:
        """Copy weights that no gather of this engine copies."""
        raise NotImplementedError

    def _config(self) -> EngineConfig:
        raise NotImplementedError

    def _engine(
        self, optimizer: Optimizer, model: Any, layouts: dict[Parameter, Layout], names: dict[int, str]
    ) -> ZeroOptimizer:
        return ZeroOptimizer(optimizer, model, layouts, self._config(), parameter_names=names)


class LowLevelZeroPlugin(EnginePlugin, StockLowLevelZeroPlugin):
    """ZeRO stage 1 and 2.  Takes the arguments of colossalai.booster.plugin.LowLevelZeroPlugin.

    Args:
        low_rank: how gradients of projected parameters travel; see `LowRankOptions`.
    Raises:
        ValueError: fp8_communication or use_fp8 is asked for.
    """

    def __init__(self, *args: Any, low_rank: LowRankOptions | None = None, **kwargs: Any) -> None:
        self.low_rank = low_rank or LowRankOptions()
        check_zero(arguments_of(StockLowLevelZeroPlugin, args, kwargs), StockLowLevelZeroPlugin)
        install_cpu_accelerator()
        with limit_waiting():
            super().__init__(*args, **kwargs)

    def no_sync(self, model: nn.Module, optimizer: OptimizerWrapper) -> Any:
        return optimizer.no_sync()

    def add_lora_params_to_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put adapters into the param groups of what they adapt; boosting does so itself."""
        adopt_adapters(model, optimizer)

    def _wrap(self, model: nn.Module) -> Any:
        return StockLowLevelZeroPlugin.configure(self, model)[0]

    def _start_equal(self, model: Any, plain: bool) -> None:
        if not plain or has_adapters(model):
            same_start(model, dist.group.WORLD)

    def _config(self) -> EngineConfig:
        options = self.zero_optim_kwargs
        groups: tuple[Any, ...] = (dist.group.WORLD,)
        if "extra_dp_group" in options:
            groups = (options["extra_dp_group"], options["dp_process_group"])
        return EngineConfig(
            data_groups=groups,
            zero_groups=groups,
            max_norm=options["clip_grad_norm"],
            master_weights=options["master_weights"],
            verbose=self.verbose,
            low_rank=self.low_rank,
            fp16={key: options[key] for key in SCALER_ARGUMENTS} if self.precision == "fp16" else None,
            **_shared_options(options),
        )


class HybridParallelPlugin(EnginePlugin, StockHybridParallelPlugin):
    """Tensor, pipeline and data parallelism with ZeRO 0, 1, 2.

    Takes the arguments of colossalai.booster.plugin.HybridParallelPlugin.  Kernels that a machine without an
    accelerator lacks are switched off with one warning.

    Args:
        low_rank: how gradients of projected parameters travel; see `LowRankOptions`.
    Raises:
        ValueError: what `check_hybrid` refuses: fp8, zero-bubble pipelines, ring sequence parallelism, options of
            torch's DDP at stage 0, overlap_allgather together with tensor parallelism.
    """

    def __init__(self, *args: Any, low_rank: LowRankOptions | None = None, **kwargs: Any) -> None:
        self.low_rank = low_rank or LowRankOptions()
        arguments = arguments_of(StockHybridParallelPlugin, args, kwargs)
        on_cpu = install_cpu_accelerator()
        check_hybrid(arguments, StockHybridParallelPlugin, on_cpu=on_cpu)
        with limit_waiting():
            super().__init__(**arguments)
        if on_cpu:
            self._switch_off_kernels()

    def __del__(self) -> None:
        # What was refused in the constructor has no process groups to destroy.
        if hasattr(self, "pg_mesh"):
            keep_groups(self.pg_mesh._ranks_to_group.values())
            super().__del__()

    def configure(self, model: Any, *args: Any, **kwargs: Any) -> Boosted:
        refuse_adapters(model, self.tp_size, self.pp_size)
        return super().configure(model, *args, **kwargs)

    @says_where("pipeline")
    def execute_pipeline(self, *args: Any, **kwargs: Any) -> Any:
        return super().execute_pipeline(*args, **kwargs)

    def _wrap(self, model: nn.Module) -> HybridModule:
        if self.zero_stage == 0 and self.dp_size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.mixed_dp_group)
        wrapped = HybridModule(
            model,
            precision=self.precision,
            shard_config=self.shard_config,
            dp_group=self.mixed_dp_group,
            tp_group=self.tp_group,
            sp_group=self.sp_group,
            use_ddp=False,
            ddp_config=self.ddp_config,
            custom_policy=self.custom_policy,
            overlap_allgather=self.zero_stage > 0 and self.zero_config["overlap_allgather"],
            use_fp8=self.use_fp8,
        )
        if self.tp_size > 1 and not self.enable_sequence_parallelism:
            share_masks(wrapped, self.tp_group)
        return wrapped

    def _given(self) -> Given:
        return "parts" if self.zero_stage > 0 or self.tp_size > 1 or self.pp_size > 1 else "wholes"

    def _start_equal(self, model: Any, plain: bool) -> None:
        if self.zero_stage == 0 or not plain:
            same_start(model, self.mixed_dp_group, buffers=self.ddp_config["broadcast_buffers"])

    def _engine(
        self, optimizer: Optimizer, model: Any, layouts: dict[Parameter, Layout], names: dict[int, str]
    ) -> ZeroOptimizer:
        if self.enable_pipeline_parallelism:
            if not self.stage_manager.is_last_stage(ignore_chunk=True):
                keep_output_differentiable(model.unwrap(unwrap_peft=False))
            if not is_plain(optimizer):
                plan_stages(trained_of(optimizer), set(layouts), self.pp_group)
        tied = tied_elsewhere(model)
        model.engine = ZeroOptimizer(
            optimizer, model, layouts, self._config(), parameter_names=names, tied_elsewhere=tied
        )
        return model.engine

    def _config(self) -> EngineConfig:
        groups = (self.mixed_dp_group,)
        options = dict(self.zero_config)
        if self.zero_stage == 0:
            options["reduce_bucket_size"] = self.ddp_config["bucket_cap_mb"] * 2**18
        return EngineConfig(
            data_groups=groups,
            zero_groups=groups if self.zero_stage > 0 else (),
            tp_group=self.tp_group if self.tp_size > 1 else None,
            pp_group=self.pp_group if self.pp_size > 1 else None,
            max_norm=self.max_norm,
            low_rank=self.low_rank,
            fp16={key: self.amp_config[key] for key in SCALER_ARGUMENTS} if self.precision == "fp16" else None,
            **_shared_options(options),
        )

    def _switch_off_kernels(self) -> None:
        names = ("enable_all_optimization", "enable_fused_normalization", "enable_flash_attention", "enable_jit_fused")
        asked = [name for name in names if getattr(self, name)]
        for name in names:
            setattr(self, name, False)
            setattr(self.shard_config, name, False)
        if asked:
            logger.warning("%s switched off: this machine has no accelerator with these kernels", ", ".join(asked))


class BlockDDPModel(TorchDDPModel):
    """Data parallelism for a model whose trained parameters change: torch's DDP reduces a fixed set."""

    def __init__(self, module: nn.Module) -> None:
        ModelWrapper.__init__(self, Replica(module))


class Replica(nn.Module):
    """In the place of torch's DistributedDataParallel: the model, and `no_sync`.

    Attributes:
        module: the model.
        engine: what averages its gradients; set by the plugin.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.engine: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def no_sync(self) -> Any:
        """Accumulate local gradients without communication."""
        return self.engine.no_sync()


class TorchDDPPlugin(EnginePlugin, StockTorchDDPPlugin):
    """Data parallelism.  Takes the arguments of colossalai.booster.plugin.TorchDDPPlugin.

    With a BlockOptimizer the gradients of the active block are averaged by this package's hooks instead of torch's
    DDP: parameters may always be unused, buffers are copied once, at boosting, and what else configures torch's reducer
    is refused.

    Args:
        low_rank: how gradients of projected parameters travel with a BlockOptimizer; see `LowRankOptions`.
    """

    def __init__(self, *args: Any, low_rank: LowRankOptions | None = None, **kwargs: Any) -> None:
        self.low_rank = low_rank
        self._asked = arguments_of(StockTorchDDPPlugin, args, kwargs)
        install_cpu_accelerator()
        with limit_waiting():
            super().__init__(*args, **kwargs)

    def configure(self, model: Any, optimizer: Any = None, *args: Any, **kwargs: Any) -> Boosted:
        if not is_plain(optimizer):
            changing = "the trained parameters change"
            refuse_torch_reducer("TorchDDPPlugin", self._asked, "with a BlockOptimizer", changing)
            refuse_fp8(self._asked)
            return super().configure(model, optimizer, *args, **kwargs)
        if optimizer is not None and not isinstance(optimizer, OptimizerWrapper):
            optimizer = ready_to_boost(model, optimizer, "parameters")
        if self.low_rank is not None:
            raise ValueError(
                f"TorchDDPPlugin(low_rank={self.low_rank}) without a BlockOptimizer: torch's DDP reduces whole "
                "gradients. Use LowLevelZeroPlugin, or HybridParallelPlugin(zero_stage=0)."
            )
        stock = functools.partial(StockTorchDDPPlugin.configure, self)
        return configured_by_stock(stock, model, optimizer, *args, sharded=False, **kwargs)

    def _given(self) -> Given:
        return "wholes"

    def _wrap(self, model: nn.Module) -> Any:
        return BlockDDPModel(nn.SyncBatchNorm.convert_sync_batchnorm(model.to(get_current_device()), None))

    def _start_equal(self, model: Any, plain: bool) -> None:
        same_start(model, dist.group.WORLD, buffers=self._asked["broadcast_buffers"])

    def _engine(
        self, optimizer: Optimizer, model: Any, layouts: dict[Parameter, Layout], names: dict[int, str]
    ) -> ZeroOptimizer:
        model.module.engine = super()._engine(optimizer, model, layouts, names)
        return model.module.engine

    def _config(self) -> EngineConfig:
        world: Any = dist.group.WORLD
        return EngineConfig(
            data_groups=(world,),
            zero_groups=(),
            low_rank=self.low_rank or LowRankOptions(),
            reduce_bucket_size=self._asked["bucket_cap_mb"] * 2**18,
        )

    def no_sync(self, model: nn.Module, optimizer: OptimizerWrapper) -> Any:
        return optimizer.no_sync() if isinstance(optimizer, ZeroOptimizer) else super().no_sync(model, optimizer)


def _shared_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("reduce_bucket_size", "communication_dtype", "overlap_communication", "overlap_allgather", "cpu_offload")
    return {**{name: options[name] for name in names}, "partition_grad": options["partition_grad"]}
