"""Casts from other libraries' optimizers, recognised by qualified class name so that nothing is imported for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer, BlockOptimizerRatio
from colossal_bcd.booster.distributed import require_options
from colossal_bcd.low_rank import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from colossal_bcd.names import plain_name
from colossal_bcd.optim import CAME, Adafactor, Lamb, ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import require_sound
from colossal_bcd.optim.foreign.elementwise import ELEMENTWISE, is_of, runs_update_of
from colossal_bcd.optim.register import registered

logger = logging.getLogger(__name__)

Group = Mapping[str, Any]
"""A param group, or the defaults of all groups."""

OPTIMIZERS = registered("colossal_bcd.optim", "colossal_bcd.low_rank")
"""Every optimizer of this package by its public name, with what its file says that it replaces."""

WHOLE_MATRIX: dict[str, set[str]] = {
    "torch.optim": {"Adafactor", "LBFGS", "Muon"},
    "colossalai.nn.optimizer": {"Lars"},
    "bitsandbytes.optim": {"LAMB8bit", "LARS", "LARS8bit", "LARS32bit", "PytorchLARS"},
}
"""Package -> optimizers that need more than the value and for which this version has no equal."""

INSTEAD = {
    "torch.optim.Adafactor": "Its step size min(lr, 1 / sqrt(t)), its decay by lr alone and its eps, lower bounds of "
    "the estimate, are its own. Use colossal_bcd.Adafactor, which computes what transformers.Adafactor does; nearest "
    "is Adafactor(params, lr=lr, relative_step=False).",
}
"""Qualified name -> what to use in place of an optimizer of `WHOLE_MATRIX`, where that is not plain."""

BLOCKWISE: dict[str, set[str]] = {
    "badam": {"BlockOptimizer", "BlockOptimizerRatio"},
    "block_optim": {"BlockOptimizer", "BlockOptimizerRatio", "SparseGradOptimizer"},
}
"""Package -> optimizers that freeze and unfreeze parameters themselves."""


def _colossalai_lamb(optimizer: Any, group: Group) -> dict[str, Any]:
    """ColossalAI's classes apply the bias correction to the step size (nn/optimizer/lamb.py, distributed_lamb.py)."""
    return {
        "bias_correction": "step_size" if group["bias_correction"] else False,
        "adam": getattr(optimizer, "adam", False),
    }


def _fused_lamb(optimizer: Any, group: Group) -> dict[str, Any]:
    """Apex's LAMB is the published one; without `use_nvlamb` it has no trust ratio where nothing decays."""
    # Its step reads this one from the defaults, not from the group (nn/optimizer/fused_lamb.py).
    max_norm = optimizer.defaults["max_grad_norm"]
    if max_norm == 0 and group is optimizer.defaults:  # once, not for every group
        logger.warning("FusedLAMB(max_grad_norm=0): its kernel makes every gradient zero then; here nothing is clipped")
    if max_norm != 0 and not math.isinf(max_norm):
        raise ValueError(
            f"FusedLAMB: got max_grad_norm={max_norm}, expected math.inf: clipping belongs to the plugin. Use "
            f"FusedLAMB(max_grad_norm=math.inf) and a plugin with max_norm={max_norm}."
        )
    if not optimizer.adam_w_mode or not group["grad_averaging"]:
        raise ValueError(
            f"FusedLAMB: got adam_w_mode={optimizer.adam_w_mode}, grad_averaging={group['grad_averaging']}; expected "
            "both to be on. Use colossal_bcd.Lamb."
        )
    return {
        "bias_correction": bool(group["bias_correction"]),
        "adam": not optimizer.use_nvlamb and group["weight_decay"] == 0,
    }


def _bitsandbytes_lamb(optimizer: Any, group: Group) -> dict[str, Any]:
    args = optimizer.args
    if args.optim_bits != 32 or args.max_unorm != 1:
        raise ValueError(
            f"bitsandbytes LAMB: got optim_bits={args.optim_bits}, max_unorm={args.max_unorm}; expected 32 and 1.0, "
            "the others have no equal here. Use LAMB(optim_bits=32) or colossal_bcd.Lamb."
        )
    if group is optimizer.defaults:  # once, not for every group
        logger.warning(
            "bitsandbytes' LAMB is AdamW with updates that are at most as long as the weight; it is cast to the LAMB "
            "of the paper, whose updates all have the weight's length times lr"
        )
    return {}


def _adafactor(optimizer: Any, group: Group) -> dict[str, Any]:
    """With relative_step the originals ignore a group's lr, which may be a scheduler's; without it they need one."""
    return {"lr": None} if group["relative_step"] else _required_lr(optimizer, group)


def _colossalai_adafactor(optimizer: Any, group: Group) -> dict[str, Any]:
    """ColossalAI never computes the root mean square of a weight (nn/optimizer/adafactor.py)."""
    if group is optimizer.defaults and any(each["scale_parameter"] for each in optimizer.param_groups):
        logger.warning(
            "ColossalAI's Adafactor takes the root mean square of every weight for 0, so that scale_parameter "
            "multiplies its steps by eps[1]=%s; here it multiplies them by the real one, as in the paper",
            group["eps"][1],
        )
    return _adafactor(optimizer, group)


def _required_lr(optimizer: Any, group: Group) -> dict[str, Any]:
    """The originals fail in their first step without one."""
    if group["lr"] is not None:
        return {}
    if group is optimizer.defaults:
        return {"lr": 0.0}
    raise ValueError(
        f"{type(optimizer).__name__}: a param group has lr=None, expected a number. Set it in optimizer.param_groups "
        "(ColossalAI's Adafactor discards the one that it is given), or use the optimizer of colossal_bcd.compat."
    )


CLAMPED = {"clamp": True}
"""The originals take as many singular vectors as there are, if these are fewer than the rank."""


def _galore_adamw(optimizer: Any, group: Group) -> dict[str, Any]:
    return CLAMPED


def _galore_adafactor(optimizer: Any, group: Group) -> dict[str, Any]:
    """As for other Adafactors: relative_step ignores the group's lr, which may be a scheduler's."""
    if group["relative_step"]:
        return {"lr": None, **CLAMPED}
    return {"lr": 0.0, **CLAMPED} if group["lr"] is None and group is optimizer.defaults else CLAMPED


def _galore_torch_8bit(optimizer: Any, group: Group) -> dict[str, Any]:
    """It passes percentile_clipping and block_wise by place, where bitsandbytes 0.50 has max_unorm and skip_zeros."""
    args = vars(optimizer.args)
    return _galore_8bit(
        optimizer,
        {"percentile_clipping": args.get("max_unorm", 100), "block_wise": args.get("skip_zeros", True), **args},
    )


def _colossalai_8bit(optimizer: Any, group: Group) -> dict[str, Any]:
    if group is optimizer.defaults:  # once, not for every group
        logger.warning(
            "ColossalAI's GaLore multiplies every tensor-parallel shard by the first rows of the basis, trains without "
            "ZeRO and writes a gradient to grad.pt; it is cast to the GaLore of the paper, which projects the whole "
            "matrix and does neither"
        )
    return _galore_8bit(optimizer, {"percentile_clipping": 100, "block_wise": True, **vars(optimizer.args)})


def _galore_8bit(optimizer: Any, args: Group) -> dict[str, Any]:
    options = {"is_paged": optimizer.is_paged, **args}
    return {**require_options(type(optimizer).__name__, options), **CLAMPED}


def _same(optimizer: Any, group: Group) -> dict[str, Any]:
    return {}


CASTS: dict[str, tuple[Any, Callable[[Any, Group], dict[str, Any]]]] = {
    **{source: (each.cls, _same) for each in OPTIMIZERS.values() for source in each.replaces},
    "colossalai.nn.optimizer.Lamb": (Lamb, _colossalai_lamb),
    "colossalai.nn.optimizer.DistributedLamb": (Lamb, _colossalai_lamb),
    "colossalai.nn.optimizer.FusedLAMB": (Lamb, _fused_lamb),
    "bitsandbytes.optim.LAMB": (Lamb, _bitsandbytes_lamb),
    "bitsandbytes.optim.LAMB32bit": (Lamb, _bitsandbytes_lamb),
    "transformers.optimization.Adafactor": (Adafactor, _adafactor),
    "colossalai.nn.optimizer.Adafactor": (Adafactor, _colossalai_adafactor),
    "colossalai.nn.optimizer.DistributedAdaFactor": (Adafactor, _colossalai_adafactor),
    "came_pytorch.CAME": (CAME, _required_lr),
    "colossalai.nn.optimizer.CAME": (CAME, _required_lr),
    "colossalai.nn.optimizer.DistributedCAME": (CAME, _required_lr),
    # The names of the classes themselves; the package exports them as GaLoreAdamW and so on.
    "galore_torch.AdamW": (GaLoreAdamW, _galore_adamw),
    "galore_torch.AdamW8bit": (GaLoreAdamW8bit, _galore_torch_8bit),
    "galore_torch.Adafactor": (GaLoreAdafactor, _galore_adafactor),
    "colossalai.nn.optimizer.GaLoreAdamW8bit": (GaLoreAdamW8bit, _colossalai_8bit),
    "colossalai.nn.optimizer.DistGaloreAwamW": (GaLoreAdamW8bit, _colossalai_8bit),
}
"""Qualified name -> our class, and what differs from the keys of a group (or of the defaults)."""


def cast(optimizer: Optimizer, *, measured: bool = False) -> Optimizer:
    """The optimizer to train with on a mesh.

    Ours pass through; known ones become ours with their hyper-parameters carried exactly and their param-group dicts
    kept (a scheduler made before goes on working); optimizers that are right on shards pass through.

    Args:
        optimizer: the user's.
        measured: the caller looks itself at what no table knows; else a warning says so.
    Raises:
        ValueError: the optimizer has taken steps, or it needs whole matrices and has no equal here, or it cannot take a
            step at all.
    """
    if isinstance(optimizer, BlockOptimizer):
        base = cast(optimizer.base_optimizer, measured=measured)
        if base is not optimizer.base_optimizer:
            optimizer.replace_base(base)
        return optimizer
    require_sound(optimizer)
    cls = type(optimizer)
    home, unchanged = _origin(cls)
    if unchanged and home in ("badam.BlockOptimizerRatio", "block_optim.SparseGradOptimizer"):
        ours = _cast_ratio(optimizer)
        _share(optimizer, ours)
        return ours
    lacking = "" if home is None else _lacking(optimizer, home)
    if home in CASTS and unchanged and not lacking:
        return _converted(optimizer, *CASTS[home])
    if home is not None and unchanged and not lacking:
        package, _, name = home.rpartition(".")
        if name in BLOCKWISE.get(package, ()):
            raise ValueError(
                f"{home} keeps masters and frozen parameters of its own, which no plugin can shard, expected this "
                "package's. Import BlockOptimizer from colossal_bcd.compat; its arguments are the same."
            )
        if name in WHOLE_MATRIX.get(package, ()):
            raise ValueError(
                f"{home} computes with whole matrices and would train wrongly on shards, expected an optimizer that "
                "has an exact equal in this version. "
                + INSTEAD.get(home, "Use one of colossal_bcd, or an element-wise optimizer of torch.optim.")
            )
    elif not isinstance(optimizer, ShardedOptimizer) and not measured:
        why = "is unknown here" if home is None else f"overrides the step of {home}, so it is not cast"
        why = f"has {lacking}, so it is not cast" if lacking else why
        logger.warning(
            "%s.%s %s and left as it is: right only if its update of a value needs that value alone",
            cls.__module__,
            cls.__qualname__,
            why,
        )
    return optimizer


def _cast_ratio(theirs: Any) -> BlockOptimizerRatio:
    """Ours with hyper-parameters, names and groups of a fresh `badam.BlockOptimizerRatio`, whose hooks are removed."""
    if theirs.global_step:
        raise ValueError(
            f"BlockOptimizerRatio has taken {theirs.global_step} steps, whose moments a cast would lose, expected "
            "none. Boost before the first step."
        )
    named = list(theirs.named_parameters_list)
    for _, param in named:
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        for number in [number for number, hook in hooks.items() if hook is theirs.sparse_hook]:
            del hooks[number]
    ratios = {name: theirs.sparse_dict[param].get("update_ratio") for name, param in named}
    ours = BlockOptimizerRatio(
        theirs.param_groups,
        named,
        theirs.update_ratio,
        theirs.verbose,
        theirs.switch_every,
        theirs.preserve_threshold,
        {name: ratio for name, ratio in ratios.items() if ratio is not None},
        theirs.mask_mode,
        optimizer_defaults={name: theirs.defaults[name] for name in ("lr", "betas", "eps") if name in theirs.defaults},
        keep_mask=theirs.keep_mask,
        # Theirs has frozen already what it does not include.
        include_embedding=True,
        include_lm_head=True,
    )
    small = [name for name, param in named if param.requires_grad and param.numel() < theirs.preserve_threshold]
    if small:
        logger.warning(
            "badam's preserve_threshold has no effect; here tensors of fewer than %d values train whole, such as %s",
            theirs.preserve_threshold,
            small[0],
        )
    return ours


def _lacking(optimizer: Any, home: str) -> str:
    """The option of an optimizer with which it computes what ours, which `register` names for it, does not."""
    options = next((each.replaces[home] for each in OPTIMIZERS.values() if home in each.replaces), {})
    for name, value in options.items():
        for source in [vars(optimizer)] if name in vars(optimizer) else optimizer.param_groups:
            if source.get(name, value) != value:
                return f"{name}={source[name]!r}"
    return ""


def _origin(cls: type) -> tuple[str | None, bool]:
    """Name of its nearest ancestor that is in the tables (it may be itself), and whether it runs that one's update."""
    for parent in cls.__mro__:
        if (name := _known(parent)) is not None:
            return name, runs_update_of(parent, cls)
    return None, False


def _known(cls: type) -> str | None:
    """`package.Class` with the package as the tables name it; None if no table has the class."""
    for package in {*ELEMENTWISE, *WHOLE_MATRIX, *BLOCKWISE, *(name.rpartition(".")[0] for name in CASTS)}:
        name = f"{package}.{cls.__qualname__}"
        listed = name in CASTS or any(
            cls.__qualname__ in table.get(package, ()) for table in (ELEMENTWISE, WHOLE_MATRIX, BLOCKWISE)
        )
        if listed and is_of(cls, package):
            return name
    return None


def _converted(
    optimizer: Optimizer, cls: Any, differences: Callable[[Any, Group], dict[str, Any]]
) -> ShardedOptimizer[Any]:
    name = type(optimizer).__name__
    if optimizer.state:
        raise ValueError(
            f"{name} holds state of {len(optimizer.state)} parameters, which a cast to colossal_bcd.{cls.__name__} "
            "would lose, expected none. Boost before the first step."
        )

    def hyper(group: Group) -> dict[str, Any]:
        return {**{key: group[key] for key in cls.hyper_keys() if key in group}, **differences(optimizer, group)}

    groups = [{"params": group["params"], **hyper(group)} for group in optimizer.param_groups]
    ours: ShardedOptimizer[Any] = cls(groups, **hyper(optimizer.defaults))
    # As it is, also where it means nothing (under relative_step) or every group has to bring its own (None).
    ours.defaults["lr"] = optimizer.defaults["lr"]
    for index, group in enumerate(optimizer.param_groups):
        group.update({**ours.param_groups[index], "lr": group["lr"]})
        ours.param_groups[index] = group
    _share(optimizer, ours)
    logger.info("%s is cast to colossal_bcd.%s", name, cls.__name__)
    return ours


def _share(source: Optimizer, target: Optimizer) -> None:
    """The very tables of hooks, so that the handles that the user holds go on removing.

    A scheduler that was made on the source finds there what it would without the cast: torch's warn unless that one has
    been stepped, transformers' AdafactorSchedule reads its groups and state.
    """
    for moment, when in product(("step", "state_dict", "load_state_dict"), ("pre", "post")):
        table = f"_optimizer_{moment}_{when}_hooks"
        setattr(target, table, getattr(source, table))

    def follow(*_: Any) -> None:
        vars(source).update(_opt_called=True, param_groups=target.param_groups, state=target.state)

    target.register_step_post_hook(follow)
    if isinstance(target, Adafactor):
        # The original's returns tensors, whose check in every step would wait for the device.
        vars(source)["_get_lr"] = target._get_lr


def shapes_of(model: Any) -> dict[int, tuple[int, ...]]:
    """Global shape by id of every parameter, trained or not, to be taken before ShardFormer replaces the data."""
    module = model.unwrap(unwrap_peft=False) if hasattr(model, "unwrap") else model
    return {id(param): tuple(param.shape) for param in module.parameters()}


def names_of(model: Any) -> dict[int, str]:
    """One name by id of every parameter, to be taken before the model is sharded: the same on every mesh."""
    module = model.unwrap(unwrap_peft=False) if hasattr(model, "unwrap") else model
    return {id(param): plain_name(name) for name, param in module.named_parameters()}
