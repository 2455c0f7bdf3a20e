"""Graphs of torch.compile follow what trains, with one graph for each active set.

torch guards `requires_grad` of every parameter, but it looks at the parameters of a module only if the dictionary that
holds them has changed since the last call, and freezing a parameter changes no dictionary: the first graph would be run
for ever, in which later blocks need no gradient.
"""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn import Parameter

from colossal_bcd.sharding import Mesh

logger = logging.getLogger(__name__)

LIMITS = (("recompile_limit", "cache_size_limit"), ("accumulated_recompile_limit", "accumulated_cache_size_limit"))
"""How many graphs torch keeps of one function, and of all its versions; under their names in newer and older torch."""

_compiled = False
"""Whether this process has compiled anything."""
_allowed: dict[str, tuple[int, int]] = {}
"""Name of a limit -> what it was for one active set, and what it was set to here."""


class CompiledGraphs:
    """Graphs of the functions that compute with some parameters; a copy of it knows nothing yet."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[nn.Module]] = []

    def renew(self, params: Collection[Parameter], num_sets: int) -> None:
        """Let the next forward pass choose its graphs by what requires a gradient now, and compile where there is none.

        To be called after parameters were, or may have been, frozen or thawed.  It costs nothing in a process that has
        compiled nothing, and a search for the modules of the parameters the first time in one that has.  `num_sets` is
        how many sets of active parameters there will be: torch keeps as many graphs for each as it was allowed for one.
        """
        if not params or not _has_compiled():
            return
        import torch._dynamo as dynamo

        if not getattr(dynamo.config, "inline_inbuilt_nn_modules", True):
            # Guards then know modules by their identity alone.
            dynamo.reset()
            return
        _raise_limits(dynamo.config, num_sets)
        wanted = {id(param) for param in params}
        for module in self._owners(wanted):
            for name, value in list(module._parameters.items()):
                if id(value) in wanted:
                    # The same value again would not count as a change.
                    module._parameters[name] = None
                    module._parameters[name] = value

    def _owners(self, wanted: set[int]) -> list[nn.Module]:
        """Living modules that hold one of the parameters of these ids, looked for where some are not known."""
        modules = [module for reference in self._modules if (module := reference()) is not None]
        if not wanted <= _parameter_ids(modules):
            modules = _living_owners(wanted)
            self._modules = [weakref.ref(module) for module in modules]
        return modules

    def __reduce__(self) -> Any:
        return type(self), ()


def _has_compiled() -> bool:
    global _compiled
    if not _compiled and "torch._dynamo" in sys.modules:
        from torch._dynamo.utils import counters, get_compilation_metrics

        _compiled = bool(counters["frames"]) or bool(get_compilation_metrics())
    return _compiled


def _raise_limits(config: Any, num_sets: int) -> None:
    for names in LIMITS:
        name = next((name for name in names if hasattr(config, name)), None)
        if name is None:
            continue
        current = getattr(config, name)
        allowed, ours = _allowed.get(name, (current, current))
        if current != ours:
            allowed = current  # somebody else has set it since
        raised = allowed * num_sets
        if raised > current:
            setattr(config, name, raised)
            if Mesh().is_first:
                logger.info(
                    "torch._dynamo.config.%s is raised from %d to %d: each of %d active sets has graphs of its own",
                    name, current, raised, num_sets,
                )  # fmt: skip
        _allowed[name] = allowed, max(raised, current)


def _living_owners(wanted: set[int]) -> list[nn.Module]:
    owners = _owners_among_tracked(wanted)
    if gc.get_freeze_count() > 0 and not wanted <= _parameter_ids(owners):
        # What gc.freeze has put aside cannot be searched, and all that lives then is put aside with it.
        gc.unfreeze()
        owners = _owners_among_tracked(wanted)
        gc.collect()
        gc.freeze()
    return owners


def _owners_among_tracked(wanted: set[int]) -> list[nn.Module]:
    # A lazy object may compute its class when it is asked for it by isinstance.
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]
    return [each for each in modules if not wanted.isdisjoint(_parameter_ids([each]))]


def _parameter_ids(modules: list[nn.Module]) -> set[int]:
    return {id(param) for module in modules for param in module._parameters.values()}
