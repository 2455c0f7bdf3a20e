"""Booster plugins: ColossalAI's, with optimizers cast, bound and block-aware.  Only the import line changes."""

from __future__ import annotations

import inspect
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
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer
from colossal_bcd.booster.checkpoint import checkpoint_io
from colossal_bcd.booster.config import EngineConfig, LowRankOptions
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.factors import holds_factors, refuse_factors
from colossal_bcd.booster.layouts import shard_layouts
from colossal_bcd.booster.pipeline import HybridModule, keep_output_differentiable, plan_stages, tied_elsewhere
from colossal_bcd.booster.prepare import prepare, same_start, thawed
from colossal_bcd.booster.registry import names_of, shapes_of
from colossal_bcd.booster.zero import ZeroOptimizer
from colossal_bcd.engine.faults import limit_waiting, named

logger = logging.getLogger(__name__)

Boosted = tuple[nn.Module, Any, Any, Any, Any]
SCALER_ARGUMENTS = (
    "initial_scale", "min_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis", "max_scale",
)  # fmt: skip


class LowLevelZeroPlugin(StockLowLevelZeroPlugin):
    """ZeRO stage 1 and 2.  Takes the arguments of colossalai.booster.plugin.LowLevelZeroPlugin.

    Args:
        low_rank: how gradients of projected parameters travel; see `LowRankOptions`.
    Raises:
        ValueError: fp8_communication is asked for.
    """

    def __init__(self, *args: Any, low_rank: LowRankOptions | None = None, **kwargs: Any) -> None:
        self.low_rank = low_rank or LowRankOptions()
        _refuse_fp8(_arguments(StockLowLevelZeroPlugin, args, kwargs))
        install_cpu_accelerator()
        with limit_waiting():
            super().__init__(*args, **kwargs)

    def supported_devices(self) -> list[str]:
        return [*super().supported_devices(), "cpu"]

    def configure(
        self,
        model: Any,
        optimizer: Any = None,
        criterion: Callable[..., Any] | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> Boosted:
        fresh = optimizer is not None and not isinstance(optimizer, OptimizerWrapper)
        if fresh and self.lora_enabled and not isinstance(optimizer, BlockOptimizer):
            self.add_lora_params_to_optimizer(model, optimizer)
        if fresh:
            optimizer = prepare(model, optimizer)
        shapes, names = (shapes_of(optimizer), names_of(model)) if fresh else ({}, {})
        with thawed(optimizer):
            model, _, criterion, dataloader, lr_scheduler = super().configure(
                model, None, criterion, dataloader, lr_scheduler
            )
        if fresh:
            if isinstance(optimizer, BlockOptimizer) or holds_factors(model):
                same_start(model, dist.group.WORLD)
            layouts = shard_layouts(model.unwrap(unwrap_peft=False), shapes, 0, 1)
            optimizer = ZeroOptimizer(optimizer, model, layouts, self._config(), parameter_names=names)
            model.update_master_params = MethodType(optimizer.update_master_params, model)
        return model, optimizer, criterion, dataloader, lr_scheduler

    def no_sync(self, model: nn.Module, optimizer: OptimizerWrapper) -> Any:
        return optimizer.no_sync()

    def get_checkpoint_io(self) -> Any:
        return checkpoint_io(super().get_checkpoint_io())

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
            low_rank=self.low_rank,
            fp16={key: options[key] for key in SCALER_ARGUMENTS} if self.precision == "fp16" else None,
            **_shared_options(options),
        )


class HybridParallelPlugin(StockHybridParallelPlugin):
    """Tensor, pipeline and data parallelism with ZeRO 0, 1, 2.

    Takes the arguments of colossalai.booster.plugin.HybridParallelPlugin.  Kernels that a machine without an
    accelerator lacks are switched off with one warning.

    Args:
        low_rank: how gradients of projected parameters travel; see `LowRankOptions`.
    Raises:
        ValueError: fp8_communication is asked for, or overlap_allgather together with tensor parallelism, where
            ColossalAI multiplies gradients.
    """

    def __init__(self, *args: Any, low_rank: LowRankOptions | None = None, **kwargs: Any) -> None:
        self.low_rank = low_rank or LowRankOptions()
        arguments = _arguments(StockHybridParallelPlugin, args, kwargs)
        _refuse_fp8(arguments)
        if arguments["overlap_allgather"] and arguments["tp_size"] > 1:
            raise ValueError(
                f"overlap_allgather=True with tp_size={arguments['tp_size']}: ColossalAI's hooks then multiply "
                "gradients; expected at most one of the two. Set overlap_allgather=False."
            )
        on_cpu = install_cpu_accelerator()
        with limit_waiting():
            super().__init__(*args, **kwargs)
        if on_cpu:
            self._switch_off_kernels()

    def supported_devices(self) -> list[str]:
        return [*super().supported_devices(), "cpu"]

    def configure(
        self,
        model: Any,
        optimizer: Any = None,
        criterion: Callable[..., Any] | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> Boosted:
        fresh = optimizer is not None and not isinstance(optimizer, OptimizerWrapper)
        refuse_factors(model, self.tp_size)
        if fresh:
            optimizer = prepare(model, optimizer)
        shapes, names = (shapes_of(optimizer), names_of(model)) if fresh else ({}, {})
        # Weights that several stages share get groups of their own.
        with thawed(optimizer), limit_waiting():
            if not isinstance(model, ModelWrapper):
                model = self._wrap(model)
        if fresh:
            optimizer = self._engine(model, optimizer, shapes, names)
            model.update_master_params = MethodType(optimizer.update_master_params, model)
        return model, optimizer, criterion, dataloader, lr_scheduler

    def get_checkpoint_io(self) -> Any:
        return checkpoint_io(super().get_checkpoint_io())

    @named("pipeline")
    def execute_pipeline(self, *args: Any, **kwargs: Any) -> Any:
        return super().execute_pipeline(*args, **kwargs)

    def _wrap(self, model: nn.Module) -> HybridModule:
        if self.zero_stage == 0 and self.dp_size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.mixed_dp_group)
        return HybridModule(
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

    def _engine(
        self,
        model: HybridModule,
        optimizer: Optimizer,
        shapes: dict[int, tuple[int, ...]],
        names: dict[int, str],
    ) -> ZeroOptimizer:
        module = model.unwrap(unwrap_peft=False)
        if self.zero_stage == 0 or isinstance(optimizer, BlockOptimizer):
            same_start(model, self.mixed_dp_group)
        layouts = shard_layouts(module, shapes, dist.get_rank(self.tp_group), self.tp_size)
        if self.enable_pipeline_parallelism:
            if not self.stage_manager.is_last_stage(ignore_chunk=True):
                keep_output_differentiable(module)
            if isinstance(optimizer, BlockOptimizer):
                plan_stages(optimizer, set(layouts), self.pp_group)
        return ZeroOptimizer(
            optimizer,
            model,
            layouts,
            self._config(),
            parameter_names=names,
            tied_elsewhere=tied_elsewhere(model),
        )

    def _config(self) -> EngineConfig:
        groups = (self.mixed_dp_group,)
        return EngineConfig(
            data_groups=groups,
            zero_groups=groups if self.zero_stage > 0 else (),
            tp_group=self.tp_group if self.tp_size > 1 else None,
            pp_group=self.pp_group if self.pp_size > 1 else None,
            max_norm=self.max_norm,
            low_rank=self.low_rank,
            fp16={key: self.amp_config[key] for key in SCALER_ARGUMENTS} if self.precision == "fp16" else None,
            **_shared_options(self.zero_config),
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
        ModelWrapper.__init__(self, module)

    def unwrap(self, unwrap_peft: bool = True) -> nn.Module:
        return ModelWrapper.unwrap(self, unwrap_peft)


class TorchDDPPlugin(StockTorchDDPPlugin):
    """Data parallelism.  Takes the arguments of colossalai.booster.plugin.TorchDDPPlugin.

    With a BlockOptimizer the gradients of the active block are averaged by this package's hooks instead of torch's
    DDP: parameters may always be unused, buffers are copied once, at boosting, and what else configures torch's reducer
    is refused.

    Args:
        low_rank: how gradients of projected parameters travel with a BlockOptimizer; see `LowRankOptions`.
    """

    def __init__(self, *args: Any, low_rank: LowRankOptions | None = None, **kwargs: Any) -> None:
        self.low_rank = low_rank
        self._asked = _arguments(StockTorchDDPPlugin, args, kwargs)
        install_cpu_accelerator()
        with limit_waiting():
            super().__init__(*args, **kwargs)

    def supported_devices(self) -> list[str]:
        return [*super().supported_devices(), "cpu"]

    def configure(
        self,
        model: Any,
        optimizer: Any = None,
        criterion: Callable[..., Any] | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> Boosted:
        if optimizer is not None and not isinstance(optimizer, OptimizerWrapper):
            optimizer = prepare(model, optimizer)
        names = names_of(model)
        if not isinstance(optimizer, BlockOptimizer):
            if self.low_rank is not None:
                raise ValueError(
                    f"TorchDDPPlugin(low_rank={self.low_rank}) without a BlockOptimizer: torch's DDP reduces whole "
                    "gradients. Use LowLevelZeroPlugin, or HybridParallelPlugin(zero_stage=0)."
                )
            boosted = super().configure(model, optimizer, criterion, dataloader, lr_scheduler)
            if boosted[1] is not None:
                boosted[1].parameter_names = names
            return boosted
        for name in ("static_graph", "check_reduction", "gradient_as_bucket_view", "fp8_communication"):
            if self._asked[name]:
                raise ValueError(
                    f"TorchDDPPlugin({name}=True) with a BlockOptimizer: torch's DDP, which that configures, is not "
                    f"used, because the trained parameters change. Set {name}=False."
                )
        shapes = shapes_of(optimizer)
        with thawed(optimizer):
            model = BlockDDPModel(nn.SyncBatchNorm.convert_sync_batchnorm(model.to(get_current_device()), None))
        same_start(model, dist.group.WORLD)
        world: Any = dist.group.WORLD
        config = EngineConfig(
            data_groups=(world,),
            zero_groups=(),
            low_rank=self.low_rank or LowRankOptions(),
            reduce_bucket_size=self._asked["bucket_cap_mb"] * 2**18,
        )
        layouts = shard_layouts(model.unwrap(False), shapes, 0, 1)
        engine = ZeroOptimizer(optimizer, model, layouts, config, parameter_names=names)
        model.update_master_params = MethodType(engine.update_master_params, model)
        return model, engine, criterion, dataloader, lr_scheduler

    def get_checkpoint_io(self) -> Any:
        return checkpoint_io(super().get_checkpoint_io())

    def no_sync(self, model: nn.Module, optimizer: OptimizerWrapper) -> Any:
        return optimizer.no_sync() if isinstance(optimizer, ZeroOptimizer) else super().no_sync(model, optimizer)


def _arguments(stock: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a stock plugin by name, defaults filled in; a wrong name raises TypeError."""
    bound = inspect.signature(stock).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _refuse_fp8(arguments: dict[str, Any]) -> None:
    if arguments["fp8_communication"]:
        raise ValueError(
            "fp8_communication=True is not supported: it loses what float32 averages keep. Set it to False."
        )


def _shared_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("reduce_bucket_size", "communication_dtype", "overlap_communication", "overlap_allgather", "cpu_offload")
    return {**{name: options[name] for name in names}, "partition_grad": options["partition_grad"]}
