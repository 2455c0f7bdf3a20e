"""What a BlockOptimizer refuses before it changes anything, and checks of arguments that files of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from colossal_bcd.block.parameters import NamedParameters
from colossal_bcd.optim.foreign.bitsandbytes_states import require_sound
from colossal_bcd.optim.foreign.contract import Contract, examine

JUDGED_LATER = ("colossalai", "galore_torch")
"""Packages with optimizers that step only as what a plugin makes of them."""


def require_int(name: str, value: Any, minimum: int) -> None:
    """Raise TypeError for what is not an int (a bool is not one here), ValueError below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected an int")
    if value < minimum:
        raise ValueError(f"{name}: got {value}, expected an int of at least {minimum}")


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError for what is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def require_base(base_optimizer: Any) -> Contract:
    """What an optimizer keeps where; refuses what cannot be driven block by block.

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
    contract: Contract, groups: Sequence[Sequence[str]], trained: set[str], kept: frozenset[str], always: frozenset[str]
) -> None:
    """Refuse kept state where the optimizer has a count that is both theirs and that of what starts anew.

    Args:
        contract: of the base optimizer.
        groups: names of the parameters of each param group.
        trained: names of what ever trains.
        kept: names of what survives switches.
        always: names of what trains at every step.
    """
    groups = [[name for name in group if name in trained] for group in groups]
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


def require_same_parameters(base_optimizer: Optimizer, model: NamedParameters, trained: Collection[str]) -> None:
    """Refuse a base optimizer with parameters that have no name, or without some that are to be trained."""
    named = {id(param) for param in model.parameters.values()}
    held = {id(param) for group in base_optimizer.param_groups for param in group["params"]}
    if held - named:
        raise ValueError(
            f"base_optimizer: {len(held - named)} of its {len(held)} parameters are not in named_parameters_list, "
            "expected all of them. Pass list(model.named_parameters()) of the model that it was made from; a base "
            "optimizer that was wrapped before cannot be wrapped again."
        )
    missing = [name for name, param in model.parameters.items() if name in trained and id(param) not in held]
    if missing:
        raise ValueError(
            f"base_optimizer: it lacks {len(missing)} parameters of blocks or active_modules or corrections, such as "
            f"{missing[0]!r}, expected all of them. Make it from model.parameters(), or give block_prefix_list without "
            "those parameters."
        )


def require_rates(base_optimizer: Optimizer, option: str) -> None:
    """Refuse a base optimizer with a param group that has no learning rate, where rates are to be multiplied."""
    for index, group in enumerate(base_optimizer.param_groups):
        if group.get("lr") is None:
            raise ValueError(
                f"{option}: got a base optimizer whose param group {index} has lr=None, expected a number, which is "
                f"multiplied. Give the {type(base_optimizer).__name__} an lr."
            )


def refuse_torch_checkpoint(owner: str, remedy: str) -> None:
    """Refuse torch's get_optimizer_state_dict and set_optimizer_state_dict; called where `state` is read.

    They keep "state" and "param_groups" by the names of parameters in the model.  Masters, which block is active and
    for how long, and the state that waits would be dropped without a word, and where there is no state yet, right after
    a switch, they take a step on zero gradients.  The first thing that they do is to look at `state`: the caller's
    caller is then one of them.
    """
    if sys._getframe(2).f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
        raise ValueError(
            f"{owner}: got torch.distributed.checkpoint.state_dict (get_, set_optimizer_state_dict), which would drop "
            f"masters and the progress of blocks and take a step of its own, expected another way to save. {remedy}"
        )


def require_same_groups(old: Optimizer, new: Optimizer, has_stepped: bool) -> None:
    """Refuse a base optimizer over other group dicts than the present one, or in the place of one that has stepped."""
    same = len(old.param_groups) == len(new.param_groups) and all(
        ours is theirs for ours, theirs in zip(old.param_groups, new.param_groups, strict=True)
    )
    if has_stepped or not same:
        raise ValueError(
            f"replace_base: got a {type(new).__name__} while the {type(old).__name__} has state of {len(old.state)} "
            f"parameters and {'the same' if same else 'other'} param groups; expected no state and the same group "
            "dicts. Replace it before the first step."
        )


def require_same_shapes(names: Mapping[Parameter, str], named: Mapping[str, Parameter]) -> None:
    """Refuse parameters in the place of others that are missing or have another shape."""
    for param, name in names.items():
        got = tuple(named[name].shape) if name in named else None
        if got != tuple(param.shape):
            raise ValueError(
                f"point_to: got {got} for parameter {name!r}, expected one of shape {tuple(param.shape)}. Make the "
                "optimizer from the parameters of this model."
            )
