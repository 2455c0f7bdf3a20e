"""The model's named parameters: which name is which tensor, and which of them may be trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.names import plain_name

_FROZEN = "_colossal_bcd_frozen"


@dataclass(frozen=True, kw_only=True)
class NamedParameters:
    """Named parameters as they were given, without what wrappers have put into the names."""

    parameters: dict[str, Parameter]
    """Every tensor under the first of its names, which is its canonical one."""
    aliases: dict[str, str]
    """Every further name of a tied tensor -> its canonical name."""
    trainable: frozenset[str]
    """Canonical names of what the user left trainable."""
    in_blocks: frozenset[str]
    """Those of them that blocks may train: all, or in a model with LoRA adapters the adapters, or the rest."""
    adapters: frozenset[str] = frozenset()
    """Canonical names of trainable LoRA adapters."""


def read_parameters(named_parameters: Iterable[tuple[str, Parameter]], lora_mode: str | None = None) -> NamedParameters:
    """Collect names, ties and what is trainable.

    Args:
        named_parameters: pairs as of `model.named_parameters()`; two names for one tensor are a tie.
        lora_mode: with "all" and "partial" blocks train the weights under the adapters, which peft has frozen.
    Raises:
        TypeError, ValueError: these are no pairs, a name comes twice, or there are no adapters for the `lora_mode`.
    """
    if not isinstance(named_parameters, Iterable):
        raise TypeError(
            f"named_parameters_list: got a {type(named_parameters).__name__}, expected (name, parameter) pairs. "
            "Pass list(model.named_parameters())."
        )
    parameters: dict[str, Parameter] = {}
    aliases: dict[str, str] = {}
    canonical: dict[int, str] = {}
    for item in named_parameters:
        if not (
            isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)
        ):
            raise TypeError(
                f"named_parameters_list: got an entry of type {type(item).__name__}, expected (name, parameter) pairs. "
                "Pass list(model.named_parameters())."
            )
        name, param = plain_name(item[0]), item[1]
        if name in parameters or name in aliases:
            raise ValueError(
                f"named_parameters_list: the name {name!r} comes twice, expected every name once. If the pairs come "
                "from several models, put a prefix before the names of each."
            )
        if id(param) in canonical:
            aliases[name] = canonical[id(param)]
        else:
            canonical[id(param)] = name
            parameters[name] = param
    trainable = frozenset(name for name, param in parameters.items() if _is_trainable(param))
    with_adapters = any(map(_is_adapter, parameters))
    adapters = frozenset(filter(_is_adapter, trainable))
    if lora_mode is not None and not adapters:
        raise ValueError(
            f"lora_mode: got {lora_mode!r} and a model without trainable LoRA adapters, expected some (parameters with "
            "a name component lora_...). Make it with peft.get_peft_model or booster.enable_lora before, or leave "
            "lora_mode out."
        )
    in_blocks = adapters if with_adapters else trainable
    if lora_mode in ("all", "partial"):
        base = {name for name, param in parameters.items() if param.is_floating_point() and not _is_adapter(name)}
        # What peft has replaced by a trainable copy computes nothing.
        base = {name for name in base if "original_module" not in name.split(".")}
        trainable, in_blocks = trainable | base, frozenset(base)
    return NamedParameters(
        parameters=parameters, aliases=aliases, trainable=trainable, in_blocks=in_blocks, adapters=adapters
    )


def set_active(param: Parameter, active: bool) -> None:
    """Let the parameter train or freeze it; what is frozen here is told from what the user froze by a mark on it."""
    param.requires_grad_(active)
    setattr(param, _FROZEN, not active)
    if not active:
        param.grad = None


def is_frozen_here(param: Parameter) -> bool:
    """Whether `set_active` has frozen the parameter."""
    return getattr(param, _FROZEN, False)


def _is_trainable(param: Parameter) -> bool:
    return param.requires_grad or is_frozen_here(param)


def _is_adapter(name: str) -> bool:
    return any(component.startswith("lora_") for component in name.split("."))
