"""Copies of a block optimizer: together with its model, or not at all."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

from torch.optim import Optimizer

from colossal_bcd.block.correction.correction import LocalGradients
from colossal_bcd.block.parameters import is_frozen_here, set_active
from colossal_bcd.optim.foreign.twin import attributes

if TYPE_CHECKING:
    from colossal_bcd.block.switching import Switching

_LEFT_TO_TORCH = ("step", "_corrections")
"""Schedulers wrap the step of the one object that they were made for; corrections are hooks on its parameters."""


class CopiedWithModel:
    """What `copy` and `pickle` ask of an optimizer that freezes and thaws the parameters of a model."""

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Switching:
        """A copy over the parameters of the model's copy; hooks and schedulers' traces stay behind, as torch's do.

        Raises:
            ValueError: the model is not copied in the same call, or other processes take part.
        """
        if self.attached or self._replicas is not None:
            raise ValueError(
                "copy.deepcopy of a BlockOptimizer that trains with other processes, expected one of a single process, "
                "as hooks and process groups cannot be copied. Copy model and optimizer before, or make new ones and "
                "load their state."
            )
        if not all(id(param) in memo for param in self.named_parameters.values()):
            raise ValueError(
                "copy.deepcopy of a BlockOptimizer without its model, expected both in one call, as the copy would "
                "train parameters of no model. Write model, optimizer = copy.deepcopy((model, optimizer)), or make a "
                "new one and load the state_dict()."
            )
        new: Any = object.__new__(type(self))
        memo[id(self)] = new
        Optimizer.__init__(new, [{"params": []}], {})
        base = self.base_optimizer
        copied = copy.deepcopy(base, memo)
        for name, value in attributes(base).items():  # torch copies defaults, state and groups
            if name not in vars(copied):
                setattr(copied, name, copy.deepcopy(value, memo))
        for name, value in vars(self).items():
            if name not in _LEFT_TO_TORCH and not name.startswith("_optimizer_"):
                setattr(new, name, copy.deepcopy(value, memo))
        for param in self.named_parameters.values():
            if is_frozen_here(param):
                set_active(memo[id(param)], False)
        new._corrections = None
        if new.corrector is not None:
            names = set(new.corrected_names())
            new._corrections = LocalGradients(new.corrector, {p: name for name, p in new.named_parameters.items()})
            new._corrections.activate([param for name, param in new.named_parameters.items() if name in names])
        return new

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse `pickle` and `copy.copy`.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a BlockOptimizer cannot be pickled or copied by itself: it holds parameters of a model. Save state_dict() "
            "and load it into a new one, or write copy.deepcopy((model, optimizer))."
        )
