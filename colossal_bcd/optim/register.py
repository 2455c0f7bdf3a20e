"""`@register`: an optimizer's public name, and the classes of other packages that it replaces at boost."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.optim import Optimizer

Class = TypeVar("Class", bound=type[Optimizer])


@dataclass(frozen=True)
class Registered:
    """One optimizer of this package."""

    cls: type[Any]
    replaces: Mapping[str, Mapping[str, Any]]
    """Qualified name of a class whose hyper-parameters have the same names and meaning -> options of the object, or of
    its groups, with which it computes the same; with others it is left as it is."""
    low_rank: bool
    """Whether it has a GaLore and a GoLore form, which project the gradient and run its rule on the low-rank one."""


_TABLE: dict[str, Registered] = {}


def register(
    name: str, *, replaces: Mapping[str, Mapping[str, Any]] | None = None, low_rank: bool = False
) -> Callable[[Class], Class]:
    """Make a class known under a public name: to `colossal_bcd`, to casts and to ColossalAI's own plugins.

    Args:
        name: under which `from colossal_bcd import ...` finds it.
        replaces: as of `Registered`; casts that have to translate arguments are in booster/casts.
        low_rank: as of `Registered`.
    Raises:
        ValueError: another class has the name.
    """

    def add(cls: Class) -> Class:
        known = _TABLE.get(name)
        if known is not None and _origin(known.cls) != _origin(cls):
            raise ValueError(
                f"register({name!r}): got {'.'.join(_origin(cls))}, expected a name that is free; it is that of "
                f"{'.'.join(_origin(known.cls))}. Choose another name."
            )
        _TABLE[name] = Registered(cls, dict(replaces or {}), low_rank)
        return cls

    return add


def registered(*folders: str) -> Mapping[str, Registered]:
    """All optimizers that modules of these folders register, by public name; imports the modules.

    Args:
        folders: dotted names of packages.
    """
    for folder in folders:
        for module in pkgutil.iter_modules(importlib.import_module(folder).__path__):
            if not module.ispkg:
                importlib.import_module(f"{folder}.{module.name}")
    return {name: each for name, each in _TABLE.items() if each.cls.__module__.rpartition(".")[0] in folders}


def _origin(cls: type[Any]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
