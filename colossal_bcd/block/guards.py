"""What a BlockOptimizer refuses before it changes anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch.optim import LBFGS, Optimizer

from colossal_bcd.block.parameters import NamedParameters
from colossal_bcd.block.partition import match
from colossal_bcd.optim.foreign.bitsandbytes_states import require_sound
from colossal_bcd.optim.foreign.contract import Contract, examine

JUDGED_LATER = ("colossalai", "galore_torch")
"""Packages with optimizers that step only as what a plugin makes of them."""


def require_base(base_optimizer: Any) -> Contract:
    """Refuse what cannot be driven block by block.

    Returns:
        What it keeps where.
    Raises:
        TypeError: not an optimizer.
        ValueError: LBFGS, or one that does not bear that its tensors are exchanged, or cannot take a step at all.
    """
    if not isinstance(base_optimizer, Optimizer):
        raise TypeError(
            f"base_optimizer: got a {type(base_optimizer).__name__}, expected a torch.optim.Optimizer, such as "
            "torch.optim.AdamW(model.parameters())"
        )
    if isinstance(base_optimizer, LBFGS):
        raise ValueError(
            "base_optimizer: got LBFGS, which evaluates the model inside its step and keeps its own list of "
            "parameters; expected one whose step reads gradients, such as torch.optim.AdamW"
        )
    require_sound(base_optimizer)
    contract = examine(base_optimizer)
    if type(base_optimizer).__module__.partition(".")[0] not in JUDGED_LATER:
        contract.require_exchangeable("base_optimizer")
    return contract


def require_counts_apart(
    contract: Contract, groups: Sequence[Sequence[str]], kept: frozenset[str], always: frozenset[str]
) -> None:
    """Refuse kept state where the optimizer has a count that is both theirs and that of what starts anew.

    Args:
        contract: of the base optimizer.
        groups: names of what each param group ever trains.
        kept: names of parameters whose state survives switches.
        always: names of parameters that train at every step.
    Raises:
        ValueError: there would have to be two counts in one place.
    """
    if contract.by_parameter or not kept.intersection(name for group in groups for name in group):
        return
    expected = (
        "expected one that counts by parameter, such as torch.optim.AdamW, where the state of active_modules or "
        "adapters is kept at a switch while that of blocks starts anew"
    )
    if contract.attributes or contract.shares_state:
        where = ", ".join(map(repr, contract.attributes)) or "entries of its state"
        raise ValueError(
            f"base_optimizer: got {contract.name}, which keeps {where} for all parameters together, {expected}. Leave "
            'active_modules out, or set adapter_state="reset".'
        )
    for index, group in enumerate(groups):
        if kept.intersection(group) and not always.issuperset(group):
            counts = ", ".join(map(repr, sorted(contract.counts)))
            other = next(name for name in group if name not in always)
            raise ValueError(
                f"base_optimizer: got {contract.name}, which counts in the param group ({counts}), and in group "
                f"{index} kept parameters together with {other!r}, {expected}. Give the parameters of active_modules a "
                'param group of their own, or with adapters set adapter_state="reset".'
            )


def require_same_parameters(base_optimizer: Optimizer, roster: NamedParameters, trained: Collection[str]) -> None:
    """Refuse a base optimizer that holds other parameters than the blocks.

    Raises:
        ValueError: one of its parameters has no name, or one that is to be trained is not in it.
    """
    named = {id(param) for param in roster.parameters.values()}
    held = {id(param) for group in base_optimizer.param_groups for param in group["params"]}
    if held - named:
        raise ValueError(
            f"base_optimizer: {len(held - named)} of its {len(held)} parameters are not in named_parameters_list, "
            "expected all of them. Pass list(model.named_parameters()) of the model that it was made from; a base "
            "optimizer that was wrapped before cannot be wrapped again."
        )
    missing = [name for name, param in roster.parameters.items() if name in trained and id(param) not in held]
    if missing:
        raise ValueError(
            f"base_optimizer: it lacks {len(missing)} parameters of blocks or active_modules or corrections, such as "
            f"{missing[0]!r}, expected all of them. Make it from model.parameters(), or give block_prefix_list without "
            "those parameters."
        )


def require_rates(base_optimizer: Optimizer, option: str) -> None:
    """Refuse a base optimizer without learning rates where they are to be multiplied.

    Raises:
        ValueError: a param group has none.
    """
    for index, group in enumerate(base_optimizer.param_groups):
        if group.get("lr") is None:
            raise ValueError(
                f"{option}: got a base optimizer whose param group {index} has lr=None, expected a number, which is "
                f"multiplied. Give the {type(base_optimizer).__name__} an lr."
            )


def always_active(active_modules: Sequence[str], roster: NamedParameters) -> tuple[str, ...]:
    """Canonical names of the trainable parameters of `active_modules`, in model order.

    Raises:
        TypeError: not a sequence of strings.
        ValueError: a prefix matches nothing, or nothing that may be trained.
    """
    if isinstance(active_modules, str) or not isinstance(active_modules, Sequence):
        raise TypeError(f"active_modules: got {active_modules!r}, expected a list of prefixes, such as ['lm_head.']")
    found: set[str] = set()
    for prefix in active_modules:
        matched = match(prefix, list(roster.parameters), roster.aliases, "active module")
        if not matched & roster.trainable:
            raise ValueError(
                f"active_modules: {prefix!r} matches {len(matched)} parameters, all frozen before, expected a "
                "trainable one. Unfreeze them or leave the prefix out."
            )
        found |= matched & roster.trainable
    return tuple(name for name in roster.parameters if name in found)
