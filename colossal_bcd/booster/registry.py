"""Casts from other libraries' optimizers, recognised by qualified class name so that nothing is imported for it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

from colossal_bcd.block import BlockOptimizer
from colossal_bcd.optim import Lamb, ShardedOptimizer

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]

ELEMENTWISE = {
    "torch.optim": {
        "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    },
    "transformers.optimization": {"AdamW"},
    "colossalai.nn.optimizer": {"CPUAdam", "FusedAdam", "FusedSGD", "HybridAdam"},
    "bitsandbytes.optim": {
        "Adam", "AdamW", "Adam8bit", "AdamW8bit", "PagedAdam", "PagedAdamW", "PagedAdam8bit", "PagedAdamW8bit", "Lion",
        "Lion8bit", "SGD", "SGD8bit", "RMSprop", "Adagrad",
    },
}  # fmt: skip
"""Optimizers whose update of a value needs that value alone: right on any shard as they are."""

WHOLE_MATRIX = {
    "torch.optim": {"Adafactor", "LBFGS", "Muon"},
    "transformers.optimization": {"Adafactor"},
    "colossalai.nn.optimizer": {
        "Adafactor", "CAME", "DistributedAdaFactor", "DistributedCAME", "DistGaloreAwamW", "GaLoreAdamW8bit", "Lars",
    },
    "galore_torch": {"GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor"},
    "came_pytorch": {"CAME"},
    "bitsandbytes.optim": {"LAMB8bit", "LARS", "LARS8bit"},
}  # fmt: skip
"""Optimizers that need more than the value and for which this version has no equal."""


def _home(optimizer: Optimizer) -> str:
    """`package.Class`, with the package as the tables name it, of the class whose `step` the optimizer runs."""
    cls = type(optimizer)
    for parent in cls.__mro__[:-1]:
        if inspect.unwrap(vars(parent).get("step", cls.step)) is not inspect.unwrap(cls.step):
            break
        for package in (*ELEMENTWISE, *WHOLE_MATRIX):
            inside = parent.__module__ == package or parent.__module__.startswith(package + ".")
            home = f"{package}.{parent.__qualname__}"
            if inside and (
                home in CASTS or parent.__qualname__ in ELEMENTWISE.get(package, set()) | WHOLE_MATRIX[package]
            ):
                return home
    return f"{cls.__module__}.{cls.__qualname__}"


def _colossalai_lamb(optimizer: Any) -> Groups:
    """ColossalAI's classes apply the bias correction to the step size (nn/optimizer/lamb.py, distributed_lamb.py)."""
    return [
        {
            "bias_correction": "step_size" if group["bias_correction"] else False,
            "adam": getattr(optimizer, "adam", False),
        }
        for group in optimizer.param_groups
    ]


def _fused_lamb(optimizer: Any) -> Groups:
    """Apex's LAMB is the published one; without `use_nvlamb` it has no trust ratio where nothing decays."""
    mapped = []
    for index, group in enumerate(optimizer.param_groups):
        if group["max_grad_norm"]:
            raise ValueError(
                f"FusedLAMB group {index} has max_grad_norm={group['max_grad_norm']}: clipping belongs to the plugin. "
                f"Use FusedLAMB(max_grad_norm=0) and a plugin with max_norm={group['max_grad_norm']}."
            )
        if not optimizer.adam_w_mode or not group["grad_averaging"]:
            raise ValueError(
                f"FusedLAMB group {index}: got adam_w_mode={optimizer.adam_w_mode}, "
                f"grad_averaging={group['grad_averaging']}; expected both to be on. Use colossal_bcd.Lamb."
            )
        mapped.append({"adam": not optimizer.use_nvlamb and group["weight_decay"] == 0})
    return mapped


def _bitsandbytes_lamb(optimizer: Any) -> Groups:
    if optimizer.args.optim_bits != 32:
        raise ValueError("bitsandbytes LAMB with 8-bit state has no equal here; use LAMB(optim_bits=32) or Lamb")
    logger.info("bitsandbytes' LAMB caps the update's norm by the weight's; it is cast to the paper's trust ratio")
    return [{} for _ in optimizer.param_groups]


CASTS: dict[str, tuple[Any, Callable[[Any], Groups]]] = {
    "colossalai.nn.optimizer.Lamb": (Lamb, _colossalai_lamb),
    "colossalai.nn.optimizer.DistributedLamb": (Lamb, _colossalai_lamb),
    "colossalai.nn.optimizer.FusedLAMB": (Lamb, _fused_lamb),
    "bitsandbytes.optim.LAMB": (Lamb, _bitsandbytes_lamb),
}
"""Qualified name -> our class, and what differs from its group's keys, group by group."""


def cast(optimizer: Optimizer) -> Optimizer:
    """The optimizer to train with on a mesh.

    Ours pass through; known ones become ours with their hyper-parameters carried exactly and their param-group dicts
    kept (a scheduler made before goes on working); optimizers that are right on shards pass through.

    Raises:
        ValueError: the optimizer has taken steps, or it needs whole matrices and has no equal here.
    """
    if isinstance(optimizer, BlockOptimizer):
        base = cast(optimizer.base_optimizer)
        if base is not optimizer.base_optimizer:
            optimizer.replace_base(base)
        return optimizer
    home = _home(optimizer)
    if home in CASTS:
        return _converted(optimizer, *CASTS[home])
    package, _, name = home.rpartition(".")
    if name in WHOLE_MATRIX.get(package, ()):
        raise ValueError(
            f"{home} computes with whole matrices and would train wrongly on shards; this version has no exact equal. "
            "Use colossal_bcd.Lamb, colossal_bcd.AdamW, or one of torch.optim's element-wise optimizers."
        )
    if not isinstance(optimizer, ShardedOptimizer) and name not in ELEMENTWISE.get(package, ()):
        logger.warning(
            "%s is unknown here and left as it is: right only if its update of a value needs that value alone", home
        )
    return optimizer


def _converted(optimizer: Optimizer, cls: Any, differences: Callable[[Any], Groups]) -> ShardedOptimizer:
    name = type(optimizer).__name__
    if optimizer.state:
        raise ValueError(
            f"{name} holds state of {len(optimizer.state)} parameters, which a cast to colossal_bcd.{cls.__name__} "
            "would lose. Boost before the first step."
        )
    fields = cls.hyper_type.__dataclass_fields__
    groups = []
    for group, changed in zip(optimizer.param_groups, differences(optimizer), strict=True):
        kept = {key: value for key, value in group.items() if key in fields or key == "params"}
        groups.append({**kept, **changed})
    ours = cls(groups)
    for index, group in enumerate(optimizer.param_groups):
        group.update(ours.param_groups[index])
        ours.param_groups[index] = group
    _carry_hooks(optimizer, ours)
    logger.info("%s is cast to colossal_bcd.%s", name, cls.__name__)
    return ours


def _carry_hooks(source: Optimizer, target: Optimizer) -> None:
    for table in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        getattr(target, table).update(getattr(source, table))
    # A scheduler made on the source warns unless it sees that optimizer step before its own first step.
    target.register_step_post_hook(lambda *_: setattr(source, "_opt_called", True))


def shapes_of(optimizer: Optimizer | None) -> dict[int, tuple[int, ...]]:
    """Global shape by id of every parameter, to be taken before ShardFormer replaces the data."""
    return {id(param): tuple(param.shape) for param in parameters_of(optimizer)}


def parameters_of(optimizer: Optimizer | None) -> Iterable[Any]:
    """Every parameter that the optimizer may train, active or not."""
    if optimizer is None:
        return []
    if isinstance(optimizer, BlockOptimizer):
        return list(optimizer.named_parameters.values())
    return [param for group in optimizer.param_groups for param in group["params"]]
