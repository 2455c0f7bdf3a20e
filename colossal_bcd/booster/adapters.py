"""Adapters: those that `booster.enable_lora` made after the optimizer, and the factors of a ReLoRaModel."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from colossalai.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.trained import is_plain, trained_of
from colossal_bcd.engine.masters import ShardedMasters
from colossal_bcd.engine.reducer import GradientReducer
from colossal_bcd.low_rank.relora.layer import ReLoRaLinear
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh

logger = logging.getLogger(__name__)


class LoraPlugin:
    """`enable_lora` of a plugin of this package; comes before ColossalAI's plugin in the order of bases."""

    def enable_lora(
        self,
        model: nn.Module,
        pretrained_dir: str | None = None,
        lora_config: Any = None,
        bnb_quantization_config: Any = None,
    ) -> nn.Module:
        """The model with adapters of peft; an optimizer made before gets them when it is boosted.

        Raises:
            ValueError: quantized weights are asked for on a machine without an accelerator.
        """
        if bnb_quantization_config is not None and get_accelerator().name == "cpu":
            raise ValueError(
                "enable_lora: got a bnb_quantization_config on a machine without an accelerator, where ColossalAI "
                "cannot quantize a model, expected None. Leave it out, or run on a CUDA device."
            )
        stock: Any = super()
        return stock.enable_lora(model, pretrained_dir, lora_config, bnb_quantization_config)


def adopt_adapters(model: nn.Module, optimizer: Any) -> None:
    """Put trainable adapters of peft that no param group has into the group of the weight that they adapt.

    Raises:
        ValueError: a BlockOptimizer was made before the adapters, so that its blocks do not have them.
    """
    if not isinstance(optimizer, Optimizer):
        return
    known = {id(param) for param in trained_of(optimizer).parameters()}
    names = {id(param): name for name, param in model.named_parameters()}
    missing = [(new, origin) for new, origin in _adapters(model) if new.requires_grad and id(new) not in known]
    if not missing:
        return
    if not is_plain(optimizer):
        # One that was made from the model with adapters has frozen those that it leaves out.
        raise ValueError(
            f"boost: got a BlockOptimizer without the model's {len(missing)} adapter weights, such as "
            f"{names[id(missing[0][0])]!r}: it was made before enable_lora. Construct it, and its base optimizer, from "
            "the model that enable_lora returns."
        )
    group_of = {id(param): index for index, group in enumerate(optimizer.param_groups) for param in group["params"]}
    adopted: dict[int, list[Parameter]] = {}
    for new, origin in missing:
        if id(origin) in group_of:
            adopted.setdefault(group_of[id(origin)], []).append(new)
    for index, params in adopted.items():
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.extend_group(index, params)
        else:
            optimizer.param_groups[index]["params"].extend(params)
    num_adopted = sum(map(len, adopted.values()))
    logger.info("%s adapter weights join the param groups of the weights that they adapt", num_adopted)
    if num_adopted < len(missing):
        logger.warning(
            "%s trainable adapter weights are in no param group, nor is what they adapt: they do not train",
            len(missing) - num_adopted,
        )


def _adapters(model: nn.Module) -> Iterator[tuple[Parameter, Parameter | None]]:
    """Each parameter that peft has added, with the one that it adapts or stands for."""
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            base: Any = module.base_layer
            own = {id(param) for param in base.parameters()}
            origin = getattr(base, "weight", None)
            for param in module.parameters():
                if id(param) not in own:
                    yield param, origin
        elif isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            original: Any = module.original_module
            origins = dict(original.named_parameters())
            for copy in module.modules_to_save.values():
                for name, param in copy.named_parameters():
                    yield param, origins.get(name)


class EngineAdapters:
    """The `AdapterAccess` of an engine; made between backward and the step.

    The engine does not know the full gradients: they are of weights that it does not train.  `merge_and_reinit`
    averages them over the engine's data-parallel ranks, and gives the engine the gradients of the factors that follow
    from them, averaged already, in place of those that backward has left.
    """

    def __init__(
        self, masters: ShardedMasters, reducer: GradientReducer, states: Mapping[Tensor, Any], mesh: Mesh
    ) -> None:
        self._masters, self._reducer, self._states, self.mesh = masters, reducer, states, mesh
        reducer.take_back()
        if reducer.unfinished:
            reducer.finish()

    def holds(self, factor: Parameter) -> bool:
        return factor in self._masters.of

    def layout(self, factor: Parameter) -> Layout:
        return self._masters.layout(factor)

    def state(self, factor: Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self._states.get(self._masters.of[factor], {})
        return state

    def restart(self, factor: Parameter, grad: Tensor) -> None:
        factor.data.zero_()
        self._masters.of[factor].zero_()
        factor.grad = None
        share = self.layout(factor).shard(grad) if self._reducer.config.partition else grad
        self._reducer.grads[factor] = share.reshape(-1)


def has_adapters(model: nn.Module) -> bool:
    """Whether some layer trains in low rank while its weight is frozen and merged into."""
    return any(isinstance(module, ReLoRaLinear) for module in model.modules())


def refuse_adapters(model: nn.Module, tp_size: int, pp_size: int) -> None:
    """Refuse a model that ColossalAI's sharding of layers would take for one with plain linear layers.

    Some layer trains in low rank, or has adapters of peft, which tensor parallelism would drop, and below which
    pipelines do not find the layers that they divide.
    """
    if has_adapters(model):
        raise ValueError(
            "HybridParallelPlugin: got a model with ReLoRaLinear layers, which ColossalAI's ShardFormer cannot divide, "
            "expected one without. Use LowLevelZeroPlugin, or train the model as it is with colossal_bcd.GoLoreAdamW, "
            "which is the same method on any mesh."
        )
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "lora_A")), None)
    if adapted is not None and tp_size > 1:
        raise ValueError(
            f"HybridParallelPlugin: got a model with LoRA adapters, such as {adapted!r}, and tp_size={tp_size}, whose "
            "layers ColossalAI replaces without their adapters; expected tp_size=1. Use LowLevelZeroPlugin, or "
            "tp_size=1 with zero_stage=1 or 2."
        )
    if adapted is not None and pp_size > 1:
        raise ValueError(
            f"HybridParallelPlugin: got a model with LoRA adapters, such as {adapted!r}, and pp_size={pp_size}, whose "
            "stages ColossalAI does not find in such a model; expected pp_size=1. Use LowLevelZeroPlugin, or pp_size=1 "
            "with zero_stage=1 or 2."
        )
