"""What a BlockOptimizer refuses before it changes anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch.optim import LBFGS, Optimizer

from colossal_bcd.block.partition import match
from colossal_bcd.block.roster import Roster


def require_base(base_optimizer: Any) -> None:
    """Refuse what cannot be driven block by block.

    Raises:
        TypeError: not an optimizer.
        ValueError: LBFGS.
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


def require_same_parameters(base_optimizer: Optimizer, roster: Roster, trained: Collection[str]) -> None:
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


def always_active(active_modules: Sequence[str], roster: Roster) -> tuple[str, ...]:
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
