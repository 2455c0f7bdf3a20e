"""Booster plugins: ColossalAI's, with optimizers cast, bound and block-aware.  Only the import line changes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin import HybridParallelPlugin as StockHybridParallelPlugin
from colossalai.booster.plugin import LowLevelZeroPlugin as StockLowLevelZeroPlugin
from colossalai.booster.plugin import TorchDDPPlugin as StockTorchDDPPlugin
from colossalai.booster.plugin.hybrid_parallel_plugin import get_param_info
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPModel
from colossalai.interface import ModelWrapper, OptimizerWrapper
from colossalai.utils import get_current_device
from torch import nn
from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.layouts import shard_layouts
from colossal_bcd.booster.pipeline import HybridModule, keep_output_differentiable, stage_ranges, tied_elsewhere
from colossal_bcd.booster.registry import cast, parameters_of, shapes_of
from colossal_bcd.booster.zero import EngineConfig, ZeroOptimizer

logger = logging.getLogger(__name__)

Boosted = tuple[nn.Module, Any, Any, Any, Any]
SCALER_ARGUMENTS = (
    "initial_scale", "min_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis", "max_scale",
)  # fmt: skip


class LowLevelZeroPlugin(StockLowLevelZeroPlugin):
    """ZeRO stage 1 and 2.  Takes the arguments of colossalai.booster.plugin.LowLevelZeroPlugin.

    Raises:
        ValueError: fp8_communication is asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_fp8(_arguments(StockLowLevelZeroPlugin, args, kwargs))
        install_cpu_accelerator()
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
        if fresh and self.lora_enabled:
            self.add_lora_params_to_optimizer(model, optimizer)
        if fresh:
            optimizer = _prepare(model, optimizer)
        shapes = shapes_of(optimizer) if fresh else {}
        with _thawed(optimizer):
            model, _, criterion, dataloader, lr_scheduler = super().configure(
                model, None, criterion, dataloader, lr_scheduler
            )
        if fresh:
            layouts = shard_layouts(model.unwrap(unwrap_peft=False), shapes, 0, 1)
            optimizer = ZeroOptimizer(optimizer, model, layouts, self._config())
            model.update_master_params = MethodType(optimizer.update_master_params, model)
        return model, optimizer, criterion, dataloader, lr_scheduler

    def no_sync(self, model: nn.Module, optimizer: OptimizerWrapper) -> Any:
        return optimizer.no_sync()

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
            fp16={key: options[key] for key in SCALER_ARGUMENTS} if self.precision == "fp16" else None,
            **_shared_options(options),
        )


class HybridParallelPlugin(StockHybridParallelPlugin):
    """Tensor, pipeline and data parallelism with ZeRO 0, 1, 2.

    Takes the arguments of colossalai.booster.plugin.HybridParallelPlugin.  Kernels that a machine without an
    accelerator lacks are switched off with one warning.

    Raises:
        ValueError: fp8_communication is asked for, or overlap_allgather together with tensor parallelism, where
            ColossalAI multiplies gradients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = _arguments(StockHybridParallelPlugin, args, kwargs)
        _refuse_fp8(arguments)
        if arguments["overlap_allgather"] and arguments["tp_size"] > 1:
            raise ValueError(
                f"overlap_allgather=True with tp_size={arguments['tp_size']}: ColossalAI's hooks then multiply "
                "gradients; expected at most one of the two. Set overlap_allgather=False."
            )
        on_cpu = install_cpu_accelerator()
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
        if fresh:
            optimizer = _prepare(model, optimizer)
        shapes = shapes_of(optimizer) if fresh else {}
        info = get_param_info(optimizer) if fresh else {}
        with _thawed(optimizer):
            if not isinstance(model, ModelWrapper):
                model = self._wrap(model)
        if fresh:
            optimizer = self._engine(model, optimizer, shapes, info)
            model.update_master_params = MethodType(optimizer.update_master_params, model)
        return model, optimizer, criterion, dataloader, lr_scheduler

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
        if self.zero_stage == 0:
            _same_start(wrapped, self.mixed_dp_group)
        return wrapped

    def _engine(
        self, model: HybridModule, optimizer: Optimizer, shapes: dict[int, tuple[int, ...]], info: dict[str, Any]
    ) -> ZeroOptimizer:
        module = model.unwrap(unwrap_peft=False)
        layouts = shard_layouts(module, shapes, dist.get_rank(self.tp_group), self.tp_size)
        if self.enable_pipeline_parallelism:
            if not self.stage_manager.is_last_stage(ignore_chunk=True):
                keep_output_differentiable(module)
            if isinstance(optimizer, BlockOptimizer):
                self._plan_stages(optimizer, set(layouts))
        return ZeroOptimizer(
            optimizer, model, layouts, self._config(), param_info=info, tied_elsewhere=tied_elsewhere(model)
        )

    def _plan_stages(self, optimizer: BlockOptimizer, held: set[nn.Parameter]) -> None:
        if optimizer.ranges_given:
            return
        ranges = stage_ranges(optimizer, held, self.pp_group)
        if ranges is None:
            logger.warning("the blocks do not fall into pipeline stages; one block is active in the whole pipeline")
        else:
            optimizer.reschedule(ranges)

    def _config(self) -> EngineConfig:
        groups = (self.mixed_dp_group,)
        return EngineConfig(
            data_groups=groups,
            zero_groups=groups if self.zero_stage > 0 else (),
            tp_group=self.tp_group if self.tp_size > 1 else None,
            pp_group=self.pp_group if self.pp_size > 1 else None,
            max_norm=self.max_norm,
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
    DDP; its reducer arguments (static_graph, find_unused_parameters, ...) then mean nothing, and are refused where they
    ask for something.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._asked = _arguments(StockTorchDDPPlugin, args, kwargs)
        install_cpu_accelerator()
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
            optimizer = _prepare(model, optimizer)
        if not isinstance(optimizer, BlockOptimizer):
            return super().configure(model, optimizer, criterion, dataloader, lr_scheduler)
        for name in ("static_graph", "check_reduction", "gradient_as_bucket_view", "fp8_communication"):
            if self._asked[name]:
                raise ValueError(
                    f"TorchDDPPlugin({name}=True) with a BlockOptimizer: torch's DDP, which that configures, is not "
                    f"used, because the trained parameters change. Set {name}=False."
                )
        shapes = shapes_of(optimizer)
        with _thawed(optimizer):
            model = BlockDDPModel(nn.SyncBatchNorm.convert_sync_batchnorm(model.to(get_current_device()), None))
        _same_start(model, dist.group.WORLD)
        world: Any = dist.group.WORLD
        config = EngineConfig(
            data_groups=(world,),
            zero_groups=(),
            reduce_bucket_size=self._asked["bucket_cap_mb"] * 2**18,
        )
        engine = ZeroOptimizer(optimizer, model, shard_layouts(model.unwrap(False), shapes, 0, 1), config)
        return model, engine, criterion, dataloader, lr_scheduler

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


def _prepare(model: nn.Module, optimizer: Any) -> Optimizer:
    """Cast the optimizer and settle what would fail later, before the first collective."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"boost: got an optimizer of type {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    trained = {id(param) for param in parameters_of(optimizer)}
    foreign = trained - {id(param) for param in model.parameters()}
    if foreign:
        raise ValueError(
            f"boost: {len(foreign)} of the optimizer's {len(trained)} parameters are not in the model. Construct the "
            "optimizer from the parameters of the model that is boosted, after the model was changed or copied."
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and id(module.weight) in trained:
            raise ValueError(f"module {name!r} has sparse gradients, expected dense ones. Build it with sparse=False.")
    if isinstance(optimizer, BlockOptimizer):
        _prefer_non_reentrant(model)
    return cast(optimizer)


def _prefer_non_reentrant(model: Any) -> None:
    """Reentrant checkpointing cuts the graph where a segment's input needs no gradient: above frozen layers."""
    changed = False
    module: Any
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant", True):
            keywords = {**checkpoint.keywords, "use_reentrant": False}
            module._gradient_checkpointing_func = functools.partial(checkpoint.func, *checkpoint.args, **keywords)
            changed = True
    if changed:
        logger.info(
            "gradient checkpointing uses use_reentrant=False: the reentrant kind needs gradients below the block"
        )


@contextlib.contextmanager
def _thawed(optimizer: Any) -> Iterator[None]:
    """Everything that will ever be trained requires grad while ColossalAI wraps the model; attaching freezes again."""
    if isinstance(optimizer, BlockOptimizer):
        for param in parameters_of(optimizer):
            param.requires_grad_(True)
    yield


@torch.no_grad()
def _same_start(model: nn.Module, group: Any) -> None:
    """Copy weights and buffers of the group's first rank to the others, as torch's DDP does."""
    if dist.get_world_size(group) > 1:
        source = dist.get_global_rank(group, 0)
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, source, group=group)
