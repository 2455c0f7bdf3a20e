"""Adapters that `booster.enable_lora` made after the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from colossalai.accelerator import get_accelerator
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.trained import is_plain, trained_of
from colossal_bcd.optim import ShardedOptimizer

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
    """Put trainable adapters that no param group has into the group of the weight that they adapt.

    Args:
        model: not wrapped yet; nothing happens unless it has adapters of peft.
        optimizer: the user's.
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
