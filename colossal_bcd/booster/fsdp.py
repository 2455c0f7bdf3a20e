"""ZeRO-3 under the booster: `FSDP2Plugin`, whose weights torch's FSDP2 shards, gathers and reduces.

configure   casts and checks as the other plugins do, casts weights to bfloat16, starts all ranks equal, divides layers
            (tensor parallelism), shards them, and points the optimizer to the sharded parameters
backward    is FSDP2's: it gathers weights and reduces gradients
step        is the engine's: masters, one norm, the update; a plain optimizer is a plan of one block
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, Literal

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster.plugin.dp_plugin_base import DPPluginBase
from colossalai.interface import AMPModelMixin, ModelWrapper, OptimizerWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from colossal_bcd.block.checks import refuse_torch_checkpoint
from colossal_bcd.block.trained import Trained, is_plain
from colossal_bcd.booster.adapters import has_adapters
from colossal_bcd.booster.arguments import check_fsdp
from colossal_bcd.booster.boosting import Uncopied, ready_to_boost, same_start
from colossal_bcd.booster.casts.registry import names_of
from colossal_bcd.booster.checkpoint_io import ShardedModelIO, checkpoint_io
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.booster.stock_surface import mend_state
from colossal_bcd.checkpoint.load import Loading
from colossal_bcd.checkpoint.opened import opened_state
from colossal_bcd.checkpoint.save import whole_state
from colossal_bcd.checkpoint.trained import EngineState
from colossal_bcd.engine.agreement import num_ranks
from colossal_bcd.engine.config import communication_device
from colossal_bcd.engine.failures import LateCheck, limit_waiting, says_where
from colossal_bcd.fsdp.engine import FsdpEngine, attach, attach_plain
from colossal_bcd.fsdp.masters import RowMasters
from colossal_bcd.fsdp.sharded_model import shard
from colossal_bcd.fsdp.tensor_parallel import parallelize, styles_of
from colossal_bcd.fsdp.torch_private import VERSION, CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from colossal_bcd.names import plain_name
from colossal_bcd.optim.foreign.bitsandbytes_states import replace_weights

logger = logging.getLogger(__name__)

Boosted = tuple[nn.Module, Any, Any, Any, Any]


class FSDP2Plugin(DPPluginBase):
    """Weights, gradients, masters and state sharded over all ranks, by torch's FSDP2: (2M + 16b)/N bytes with blocks.

    M values, b of them in the largest block, N ranks.

    Args:
        precision: "bf16": weights are cast to bfloat16 and have float32 masters while they train, as under
            LowLevelZeroPlugin; "fp32": weights stay as they are.
        max_norm: clip the global norm of the gradients of what trains; 0 does not.
        cpu_offload: weights, masters, state and the update are on the CPU.
        reshard_after_forward: gather weights again for backward (True), keep them (False), or keep them sharded over
            so many ranks; those of the outermost group stay in any case.
        reduce_dtype: dtype in which gradients travel; None: that of the weights.
        tp_size: ranks that divide layers below FSDP2, and get the same batches.
        tp_plan: see `fsdp.parallelize`; None: the model's own plan.
        replicate_size: copies of the sharded model (HSDP); gradients are averaged over them.
        gradient_checkpointing: compute activations again in backward, by the model's own non-reentrant checkpoints.
        cast_inputs: cast floating inputs of the model to bfloat16, with "bf16".
        verbose: log how the model was sharded.
    Raises:
        ValueError: an argument is wrong, or ranks cannot be divided so.
    """

    def __init__(
        self,
        precision: Literal["bf16", "fp32"] = "bf16",
        *,
        max_norm: float = 0.0,
        cpu_offload: bool = False,
        reshard_after_forward: bool | int = True,
        reduce_dtype: torch.dtype | None = None,
        tp_size: int = 1,
        tp_plan: Mapping[str, Any] | None = None,
        replicate_size: int = 1,
        gradient_checkpointing: bool = False,
        cast_inputs: bool = True,
        verbose: bool = False,
    ) -> None:
        install_cpu_accelerator()
        super().__init__()
        self.rank: int
        self.world_size: int
        self.precision, self.max_norm, self.cpu_offload = precision, max_norm, cpu_offload
        self.reshard_after_forward, self.reduce_dtype = reshard_after_forward, reduce_dtype
        self.tp_size, self.tp_plan, self.replicate_size = tp_size, tp_plan, replicate_size
        self.gradient_checkpointing, self.cast_inputs, self.verbose = gradient_checkpointing, cast_inputs, verbose
        check_fsdp(vars(self), self.world_size)
        self.mesh, self.tp_mesh = self._meshes()
        # What DPPluginBase divides batches by: tensor-parallel ranks get the same ones.
        self.rank, self.world_size = self.rank // tp_size, self.world_size // tp_size

    def configure(
        self,
        model: Any,
        optimizer: Any = None,
        criterion: Callable[..., Any] | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> Boosted:
        fresh = optimizer is not None and not isinstance(optimizer, OptimizerWrapper)
        self._check_model(model)
        if fresh:
            optimizer = ready_to_boost(model, optimizer, "parts")
        if not isinstance(model, FSDP2Model):
            names = names_of(model)
            pinned = torch.cuda.is_available() and (VERSION >= (2, 13) or not _corrects(optimizer))
            model = self._wrap(model, pinned)
            if fresh:
                _point_to(optimizer, names, model.unwrap(unwrap_peft=False))
        if fresh:
            module, names = model.unwrap(unwrap_peft=False), names_of(model)
            if not is_plain(optimizer):
                engine = attach(module, optimizer, max_norm=self.max_norm)
            else:
                engine = attach_plain(module, optimizer, names, max_norm=self.max_norm)
            optimizer = FSDP2Optimizer(optimizer, model, engine, names)
            model.engine = engine
            model.update_master_params = MethodType(optimizer.update_master_params, model)
        return model, optimizer, criterion, dataloader, lr_scheduler

    def enable_lora(
        self,
        model: nn.Module,
        pretrained_dir: str | None = None,
        lora_config: Any = None,
        bnb_quantization_config: Any = None,
    ) -> nn.Module:
        """The model with adapters of peft; an optimizer made before gets them when it is boosted.

        Raises:
            ValueError: the model is boosted already, or quantized weights are asked for, which FSDP2 cannot shard.
        """
        from peft.mapping import get_peft_model
        from peft.peft_model import PeftModel

        if bnb_quantization_config is not None:
            raise ValueError(
                "enable_lora: got a bnb_quantization_config, expected None: FSDP2 shards weights of one dtype. Leave "
                "it out, or use LowLevelZeroPlugin."
            )
        if isinstance(model, ModelWrapper):
            raise ValueError("enable_lora: got a boosted model, expected one that is not. Enable LoRA before boosting.")
        if pretrained_dir is None:
            return get_peft_model(model, lora_config)
        return PeftModel.from_pretrained(model, pretrained_dir, is_trainable=True)

    def no_sync(self, model: nn.Module, optimizer: OptimizerWrapper) -> Any:
        wrapped: Any = model if optimizer is None else optimizer
        return wrapped.no_sync()

    def get_checkpoint_io(self) -> Any:
        return checkpoint_io(ShardedModelIO())

    def support_no_sync(self) -> bool:
        return True

    def support_lora(self) -> bool:
        return True

    def control_precision(self) -> bool:
        return True

    def control_device(self) -> bool:
        return True

    def control_checkpoint_io(self) -> bool:
        return True

    def supported_precisions(self) -> list[str]:
        return ["bf16", "fp32"]

    def supported_devices(self) -> list[str]:
        return ["cuda", "npu", "cpu"]

    def _meshes(self) -> tuple[DeviceMesh, DeviceMesh | None]:
        """Ranks that copy and share the model, and those that divide its layers."""
        sizes = {"copies": self.replicate_size, "shards": -1, "tp": self.tp_size}
        sizes["shards"] = self.world_size // (self.replicate_size * self.tp_size)
        names = tuple(name for name, size in sizes.items() if size > 1 or name == "shards")
        with limit_waiting():
            shape = tuple(sizes[name] for name in names)
            mesh = init_device_mesh(communication_device().type, shape, mesh_dim_names=names)
        if "tp" not in names:
            return mesh, None
        data = names[:-1]
        return mesh[data if len(data) > 1 else data[0]], mesh["tp"]

    def _check_model(self, model: nn.Module) -> None:
        """Refuse a model that cannot be sharded, before anything is sent."""
        if isinstance(model, FSDP2Model):
            if model.engine is not None:
                raise ValueError("boost: got a model that has been boosted with an optimizer, expected one without.")
            return
        if isinstance(model, ModelWrapper) or any(isinstance(module, FSDPModule) for module in model.modules()):
            raise ValueError(
                f"boost: got a {type(model).__name__} that is wrapped or sharded already, expected a plain module. "
                "Boost the model itself once."
            )
        if has_adapters(model):
            raise ValueError(
                "FSDP2Plugin: got a model with ReLoRaLinear layers, which merge into whole weights, expected one "
                "without. Use LowLevelZeroPlugin, or colossal_bcd.GoLoreAdamW, which is the same method on any mesh."
            )
        if any(param.is_meta for param in model.parameters()):
            raise ValueError("FSDP2Plugin: got weights on the meta device, expected values. Load the model before.")
        dtypes = {param.dtype for param in model.parameters()}
        packed = [dtype for dtype in dtypes if not dtype.is_floating_point]
        if packed or (self.precision == "fp32" and len(dtypes) > 1):
            raise ValueError(
                f"FSDP2Plugin: got weights of {sorted(map(str, dtypes))}, expected one floating dtype, as those that "
                "are gathered together travel in one buffer. Call model.to(torch.float32), or use precision='bf16'."
            )
        if self.gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(
                f"gradient_checkpointing=True: got a {type(model).__name__} without gradient_checkpointing_enable, "
                "expected a model of transformers. Wrap its layers by torch.utils.checkpoint, and leave it at False."
            )
        if self.tp_size > 1:
            adapted = next((name for name, module in model.named_modules() if hasattr(module, "lora_A")), None)
            if adapted is not None:
                raise ValueError(
                    f"FSDP2Plugin: got LoRA adapters, such as {adapted!r}, and tp_size={self.tp_size}, which cannot "
                    "divide them, expected tp_size=1. Leave it out: FSDP2 shards them, too."
                )
            styles_of(model, self.tp_size, self.tp_plan)

    def _wrap(self, model: Any, pinned: bool) -> FSDP2Model:
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        dtype = torch.bfloat16 if self.precision == "bf16" else None
        if dtype is not None:
            model = model.to(dtype)
        same_start(model, dist.group.WORLD)
        if self.tp_mesh is not None:
            parallelize(model, self.tp_mesh, self.tp_plan)
        shard(
            model,
            self.mesh,
            mp_policy=None if self.reduce_dtype is None else MixedPrecisionPolicy(reduce_dtype=self.reduce_dtype),
            offload_policy=CPUOffloadPolicy(pin_memory=pinned) if self.cpu_offload else None,
            reshard_after_forward=None if self.reshard_after_forward is True else self.reshard_after_forward,
        )
        if self.verbose and dist.get_rank() == 0:
            groups = sum(isinstance(module, FSDPModule) for module in model.modules())
            logger.info(
                "%s values in %s groups of FSDP2, over %s of %s ranks",
                sum(param.numel() for param in model.parameters()),
                groups,
                self.mesh.size() // self.replicate_size,
                num_ranks(),
            )
        return FSDP2Model(model, dtype if self.cast_inputs else None)


class FSDP2Model(ModelWrapper, AMPModelMixin):
    """What `FSDP2Plugin` makes of a model.

    Args:
        module: sharded.
        dtype: to which floating inputs are cast; None: they are not.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__(module)
        self._dtype = dtype
        self.engine: FsdpEngine | None = None
        """What trains it; set by the plugin."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._dtype is not None:
            args, kwargs = tree_map(self._cast, args), tree_map(self._cast, kwargs)
        return super().forward(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where it computes, whether its weights are offloaded or not."""
        return get_accelerator().get_current_device()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate whole local gradients without communication."""
        module: Any = self.unwrap(unwrap_peft=False)
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if floating else value


class FSDP2Optimizer(Uncopied, OptimizerWrapper, Optimizer):
    """What `FSDP2Plugin` makes of an optimizer; by type also torch's, so that schedulers can be made on it.

    Args:
        optimizer: the user's, cast.
        model: what it trains.
        engine: what steps.
        names: of all parameters, by id, for checkpoints.
    """

    def __init__(self, optimizer: Optimizer, model: FSDP2Model, engine: FsdpEngine, names: Mapping[int, str]) -> None:
        OptimizerWrapper.__init__(self, optimizer)
        self.model, self.engine, self.parameter_names = model, engine, names
        self.require_grad_sync = True

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One optimizer step on the averaged gradients; at the end of a block's period, switch to the next block."""
        if closure is not None:
            raise ValueError("step(closure): a sharded step cannot run the closure; call backward, then step()")
        if not self.require_grad_sync:
            return
        if not is_plain(self.optim):
            self.optim.step()
        else:
            self.engine.drive(self.optim.step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients of what is active; zeros in their place would count as gradients, so none are left."""
        if not is_plain(self.optim):
            self.optim.zero_grad(set_to_none)
        else:
            self.engine.zero_grad(set_to_none)

    @says_where("backward")
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)

    @says_where("backward")
    def backward_by_grad(self, *args: Any, **kwargs: Any) -> None:
        super().backward_by_grad(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate whole local gradients without communication; steps inside are left out."""
        before, self.require_grad_sync = self.require_grad_sync, False
        try:
            with self.model.no_sync():
                yield
        finally:
            self.require_grad_sync = before

    def clip_grad_by_norm(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, **kwargs: Any
    ) -> Tensor:
        """Clip the averaged gradients of what trains, between the last backward pass and `step`.  All ranks must call.

        The plugin's `max_norm` clips in the step, too.

        Returns:
            Scalar: the norm before.
        Raises:
            ValueError: another norm is asked for, or gradients are not averaged.
            RuntimeError: the norm is not finite, and `error_if_nonfinite`.
        """
        if float(norm_type) != 2:
            raise ValueError(f"clip_grad_by_norm: got norm_type={norm_type!r}, expected 2, the Euclidean norm")
        if not max_norm >= 0:
            raise ValueError(f"clip_grad_by_norm: got max_norm={max_norm!r}, expected a non-negative number")
        grads = self.engine.gradients()
        norm = self.engine.norm_of(grads)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"clip_grad_by_norm: the gradients have norm {norm.item()}, expected a finite one. Pass "
                "error_if_nonfinite=False to leave them to the step, which stops."
            )
        for grad in grads.values():
            grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(grad.device))
        return norm

    def clip_grad_by_value(self, clip_value: float, **kwargs: Any) -> None:
        """Clamp the averaged gradients of what trains to [-clip_value, clip_value]."""
        for grad in self.engine.gradients().values():
            grad.clamp_(-clip_value, clip_value)

    def get_grad_norm(self, norm_type: float = 2, **kwargs: Any) -> float | None:
        """Euclidean norm of the last step's gradients before clipping; None before the first."""
        if norm_type != 2:
            raise ValueError(f"get_grad_norm: got norm_type={norm_type}, expected 2, the norm that clipping uses")
        return self.engine.get_grad_norm()

    def update_master_params(self, model: Any) -> None:
        """Take the masters from the weights again, after these were loaded."""
        self.trained.active_set.follow(self.engine.masters.of)

    def state_dict(self, only_on_master: bool = False) -> dict[str, Any]:
        """All state, gathered: what `booster.save_optimizer` writes into a file.  All ranks must call.

        Args:
            only_on_master: the other ranks get no tensors.
        """
        return whole_state(EngineState(self.engine, self.parameter_names), everywhere=not only_on_master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on this or another mesh, or a state dict of torch's kind."""
        mend_state(self.trained.base_optimizer)
        boosted = EngineState(self.engine, self.parameter_names)
        Loading(boosted, "state dict", opened_state(state_dict)).apply()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse more parameters.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "add_param_group: got parameters after boosting, which have no masters, expected none. Add them before "
            "boosting, frozen if they are to train later, or use LowLevelZeroPlugin, which follows."
        )

    @property
    def state(self) -> Any:  # type: ignore[override]
        refuse_torch_checkpoint("a boosted optimizer", "Use booster.save_optimizer(optimizer, path).")
        return self.optim.state

    @property
    def trained(self) -> Trained:
        """The base optimizer, the plan, and what trains now."""
        return self.engine.trained

    @property
    def masters(self) -> RowMasters:
        """Masters of what trains now."""
        return self.engine.masters

    @property
    def late_check(self) -> LateCheck:
        """Whether the last gradients were finite."""
        return self.engine.late_check

    @property
    def master_to_working_param(self) -> dict[int, Parameter]:
        """Id of a master -> its weight."""
        return {id(master): param for param, master in self.engine.masters.of.items()}

    @property
    def working_to_master_param(self) -> dict[int, Tensor]:
        """Id of a weight -> its master: this rank's rows, flat."""
        return {id(param): master for param, master in self.engine.masters.of.items()}

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` before each step, on masters that have their gradients."""
        return self.trained.base_optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` after each step of the masters, before weights get their values."""
        return self.trained.base_optimizer.register_step_post_hook(hook)

    def _get_lr(self, *args: Any) -> Any:
        base: Any = self.trained.base_optimizer
        return base._get_lr(*args)


def _corrects(optimizer: Any) -> bool:
    return isinstance(optimizer, Trained) and optimizer.corrector is not None


def _point_to(optimizer: Any, names: Mapping[int, str], model: nn.Module) -> None:
    """Let an optimizer that was made before the model was sharded train the parameters that are there now.

    Args:
        optimizer: the user's, cast.
        names: of the parameters as they were, by id.
        model: as it is now.
    """
    named = {plain_name(name): param for name, param in model.named_parameters()}
    if not is_plain(optimizer):
        listed = optimizer.replica_names()
        new = {param: named.get(names.get(id(param), ""), param) for param in listed}
        replace_weights(optimizer.base_optimizer, new)
        optimizer.point_to({name: new[param] for param, name in listed.items()})
        return
    new = {param: named[names[id(param)]] for group in optimizer.param_groups for param in group["params"]}
    replace_weights(optimizer, new)
    for group in optimizer.param_groups:
        group["params"] = [new[param] for param in group["params"]]
