"""Every optimizer class of other packages that is installed here, made with its own constructor."""

from __future__ import annotations

import inspect
from typing import Any

import bitsandbytes.optim
import colossalai.nn.optimizer
import pytorch_optimizer
import schedulefree
import torch
from torch import nn
from torch.optim import Optimizer

from colossal_bcd.booster.casts import registry
from colossal_bcd.optim.foreign.contract import CLOSE, examine, update_apart

PACKAGES = (torch.optim, bitsandbytes.optim, colossalai.nn.optimizer, schedulefree, pytorch_optimizer)
CLASSES = {
    f"{package.__name__}.{name}": cls
    for package in PACKAGES
    for name, cls in sorted(vars(package).items())
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
"""Name as users import it -> class; by introspection, so that no class of a new release escapes."""

KERNELS = "No usable kernel found"
UNAVAILABLE = {
    "colossalai.nn.optimizer.CPUAdam": KERNELS,
    "colossalai.nn.optimizer.FusedAdam": KERNELS,
    "colossalai.nn.optimizer.FusedLAMB": KERNELS,
    "colossalai.nn.optimizer.FusedSGD": KERNELS,
    "colossalai.nn.optimizer.HybridAdam": KERNELS,
    # ColossalAI's constructors pass an argument that bitsandbytes no longer has.
    "colossalai.nn.optimizer.DistGaloreAwamW": "percentile_clipping",
    "colossalai.nn.optimizer.GaLoreAdamW8bit": "percentile_clipping",
    "pytorch_optimizer.DistributedMuon": "Default process group has not been initialized",
    # Its transfer of param groups is a stub.
    "pytorch_optimizer.SafeFP16Optimizer": "Need to implement the parameter group transfer",
}
"""What cannot be constructed on one process on this machine, and what its constructor says."""


def param_groups(module: nn.Module, **marks: Any) -> list[dict[str, Any]]:
    """Matrices, and the others; the usual two groups of those who do not decay biases."""
    matrices = [param for param in module.parameters() if param.dim() >= 2]
    others = [param for param in module.parameters() if param.dim() < 2]
    return [
        {"params": matrices, **dict.fromkeys(marks, True)},
        {"params": others, **dict.fromkeys(marks, False)},
    ]


def make(name: str, module: nn.Module) -> Optimizer:
    """An optimizer of the class over the module's parameters, with a learning rate and what it cannot be without."""
    cls: Any = CLASSES[name]
    parameters = inspect.signature(cls.__init__).parameters
    first = list(parameters)[1]
    options: dict[str, Any] = {"lr": 1e-2} if "lr" in parameters else {}
    required = {"num_data": 8, "num_iterations": 100, "base_optimizer": torch.optim.AdamW, "model": module}
    options |= {key: value for key, value in required.items() if _is_needed(parameters.get(key)) and key != first}
    if name.startswith("bitsandbytes") and "momentum" in parameters:
        options["momentum"] = 0.9
    if name == "colossalai.nn.optimizer.GaLoreAdafactor":
        options["relative_step"] = False
    if "rho_scheduler" in parameters:
        inner = torch.optim.SGD(module.parameters(), lr=1e-2)
        scheduler = pytorch_optimizer.ProportionScheduler(
            torch.optim.lr_scheduler.ConstantLR(inner), max_lr=1e-2, min_lr=0.0, max_value=2.0, min_value=2.0
        )
        return cls(param_groups(module), inner, module, rho_scheduler=scheduler)
    if name == "pytorch_optimizer.WSAM":
        return cls(module, param_groups(module), torch.optim.AdamW, lr=1e-2)
    if first == "model":
        return cls(module, **options)
    if first == "optimizer":
        return cls(torch.optim.AdamW(param_groups(module), lr=1e-2), **_without(options, "lr"))
    if cls.__name__ == "LBFGS":
        return cls(module.parameters(), **options)
    if "muon" in cls.__module__:
        return cls(param_groups(module, use_muon=True), **options)
    return cls(param_groups(module), **options)


def _is_needed(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is parameter.empty


def _without(options: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != key}


def verdict(name: str, module: nn.Module) -> str:
    """Where an optimizer is right: one of the columns of the table in docs/base_optimizers.md."""
    optimizer = make(name, module)
    home, _ = registry._origin(type(optimizer))
    if home in registry.CASTS:
        return "cast"
    contract = examine(optimizer)
    if contract.misfit is not None or type(optimizer) is torch.optim.LBFGS:
        return "refused"
    package, _, cls = (home or "").rpartition(".")
    if contract.attributes or cls in registry.WHOLE_MATRIX.get(package, ()):
        return "blocks on one process"
    if contract.draws:
        return "one process"
    return "everywhere" if update_apart(optimizer) <= CLOSE else "whole tensors"
