"""A block optimizer in another place: its state dict on one process, and copies of it, with the model or not at all.

The state dict is the base optimizer's, and says where in which block it was taken.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.correction.correction import LocalGradients
from colossal_bcd.block.parameters import is_frozen_here, set_active
from colossal_bcd.block.trained import Trained
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.twin import attributes, copied
from colossal_bcd.optim.state.rounding import LOW_PRECISION

_LEFT_TO_TORCH = ("step", "_corrections")
"""Schedulers wrap the step of the one object that they were made for; corrections are hooks on its parameters."""
NOT_ALONE = (
    "a BlockOptimizer cannot be pickled or copied by itself: it holds parameters of a model. Save state_dict() "
    "and load it into a new one, or write copy.deepcopy((model, optimizer))."
)


def take_state(trained: Trained) -> dict[str, Any]:
    """State and hyper-parameters of the base optimizer, progress, identity of the blocks, masters by name, and more.

    Raises:
        ValueError: an engine holds the masters.
    """
    _require_local(trained)
    named = trained.named_parameters
    block = {
        **trained.plan.progress(trained.num_steps),
        "groups": trained.group_names(trained.num_steps),
        **trained.active_set.state_dict(named),
    }
    if trained.corrector is not None:
        state = trained.corrector.state
        block["corrections"] = {name: state[param] for name, param in named.items() if param in state}
    if trained.importance is not None:
        block["importance"] = trained.importance.numbers()
    own = vars(trained.base_optimizer)
    if written := {name: copied(own[name]) for name in trained.active_set.contract.attributes if name in own}:
        block["attributes"] = written
    return {**trained.base_optimizer.state_dict(), "block": block}


def load_state(trained: Trained, saved: Mapping[str, Any]) -> None:
    """Check everything, then activate the block and load masters and state; raises ValueError where it does not fit."""
    _require_local(trained)
    if "block" not in saved:
        raise ValueError(
            f"load_state_dict: got a state with {', '.join(map(repr, saved))}, expected also 'block'. It is not one "
            "of a BlockOptimizer; a plain optimizer's state cannot tell which block it belongs to."
        )
    block, named = saved["block"], trained.named_parameters
    plan = trained.plan.resumed(block)
    _require_groups(trained.group_names(block["num_steps"], plan), block["groups"])
    _require_masters(block["masters"], {name: named[name] for group in block["groups"] for name in group})
    trained.resume_at(block["num_steps"], plan)
    if trained.importance is not None:
        trained.importance.load(block["importance"], {})
    trained.active_set.load_state_dict(block, named)
    if trained.corrector is not None:
        trained.corrector.restore({named[name]: state for name, state in block["corrections"].items()})
    base = trained.base_optimizer
    _load_base(base, {key: value for key, value in saved.items() if key != "block"})
    vars(base).update(copied(block.get("attributes", {})))


def _require_local(trained: Trained) -> None:
    if trained.engine is not None:
        raise ValueError(
            "state dict of a BlockOptimizer: an engine holds the masters, and only parts of them, expected none. Use "
            "booster.save_optimizer(optimizer, path) or colossal_bcd.fsdp.save_optimizer(engine, path)."
        )


def _require_groups(ours: list[list[str]], theirs: list[list[str]]) -> None:
    """Refuse a state of other param groups; both are names of what is active in each."""
    if len(ours) != len(theirs):
        raise ValueError(
            f"load_state_dict: got a state of {len(theirs)} param groups, expected {len(ours)}. Make the base "
            "optimizer with the groups of the run that saved it."
        )
    for index, (expected, got) in enumerate(zip(ours, theirs, strict=True)):
        if expected != got:
            raise ValueError(
                f"load_state_dict: got a state with {got} active in param group {index}, expected {expected}. Make the "
                "base optimizer with the groups of the run that saved it, in the same order."
            )


def _require_masters(masters: Mapping[str, Tensor], active: Mapping[str, Parameter]) -> None:
    """Refuse masters, by name, of other shapes than what will be active has, or of weights that need none."""
    ours = {name: tuple(param.shape) for name, param in active.items() if param.dtype in LOW_PRECISION}
    theirs = {name: tuple(master.shape) for name, master in masters.items()}
    if ours != theirs:
        name = sorted(dict(ours.items() ^ theirs.items()))[0]
        raise ValueError(
            f"load_state_dict: the state has a float32 master of shape {theirs.get(name)} for parameter {name!r}, "
            f"expected {ours.get(name)} (None: no master, as of a float32 parameter). Load into a model of the same "
            "shapes and dtype."
        )


def _load_base(base: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a base optimizer's own state dict, keeping the group dicts that schedulers hold."""
    groups, state = base.param_groups, base.state
    base.load_state_dict(copy.deepcopy(state_dict))
    for group, loaded in zip(groups, base.param_groups, strict=True):
        group.update(loaded)
    state.clear()
    state.update(base.state)
    base.param_groups, base.state = groups, state
    if not isinstance(base, ShardedOptimizer):
        _undo_casts(base, state_dict)


def _undo_casts(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give the state that an optimizer has loaded the types with which it was saved.

    `torch.optim.Optimizer.load_state_dict` casts every floating-point tensor to the parameter's dtype, and makes of a
    string the text of a generator.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for key, param in zip(keys, params, strict=True):
        loaded = optimizer.state.get(param, {})
        for name, value in state_dict["state"].get(key, {}).items():
            if name in loaded:
                loaded[name] = _as_saved(value, loaded[name])


def _as_saved(saved: Any, loaded: Any) -> Any:
    """The saved value on the device of the loaded one; the loaded one where its optimizer has made it another thing."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        same = saved.dtype == loaded.dtype or saved.shape != loaded.shape
        return loaded if same else saved.detach().to(loaded.device, copy=True)
    if isinstance(saved, str) and isinstance(loaded, str):
        return saved
    if type(saved) in (list, tuple) and type(loaded) is type(saved) and len(saved) == len(loaded):
        return type(saved)(_as_saved(*pair) for pair in zip(saved, loaded, strict=True))
    if type(saved) is dict and type(loaded) is dict and saved.keys() == loaded.keys():
        return {key: _as_saved(value, loaded[key]) for key, value in saved.items()}
    return loaded


def require_copyable(params: Iterable[Tensor], memo: dict[int, Any], *, alone: bool) -> None:
    """Refuse `copy.deepcopy` of an optimizer without its model (`memo`: copies by id), or with other processes."""
    if not alone:
        raise ValueError(
            "copy.deepcopy of a BlockOptimizer that trains with other processes, expected one of a single process, "
            "as hooks and process groups cannot be copied. Copy model and optimizer before, or make new ones and "
            "load their state."
        )
    if not all(id(param) in memo for param in params):
        raise ValueError(
            "copy.deepcopy of a BlockOptimizer without its model, expected both in one call, as the copy would "
            "train parameters of no model. Write model, optimizer = copy.deepcopy((model, optimizer)), or make a "
            "new one and load the state_dict()."
        )


def copy_base(base: Optimizer, memo: dict[int, Any]) -> None:
    """Copy an optimizer with all that it keeps on the object; torch copies defaults, state and groups."""
    new = copy.deepcopy(base, memo)
    for name, value in attributes(base).items():
        if name not in vars(new):
            setattr(new, name, copy.deepcopy(value, memo))


def deep_copy(optimizer: Any, memo: dict[int, Any], *, alone: bool) -> Any:
    """A copy of a block optimizer over the parameters of its model's copy.

    Args:
        optimizer: the BlockOptimizer.
        memo: of `copy.deepcopy`.
        alone: whether no other process takes part.
    """
    require_copyable(optimizer.named_parameters.values(), memo, alone=alone)
    new: Any = object.__new__(type(optimizer))
    memo[id(optimizer)] = new
    Optimizer.__init__(new, [{"params": []}], {})
    copy_base(optimizer.base_optimizer, memo)
    for name, value in vars(optimizer).items():
        if name not in _LEFT_TO_TORCH and not name.startswith("_optimizer_"):
            setattr(new, name, copy.deepcopy(value, memo))
    for param in optimizer.named_parameters.values():
        if is_frozen_here(param):
            set_active(memo[id(param)], False)
    new._corrections = None
    if new.corrector is not None:
        names = set(new.corrected_names())
        new._corrections = LocalGradients(new.corrector, {p: name for name, p in new.named_parameters.items()})
        new._corrections.activate([param for name, param in new.named_parameters.items() if name in names])
    return new
