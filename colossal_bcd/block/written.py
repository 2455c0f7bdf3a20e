"""Weights that are written from outside: `load_state_dict`, clamping, an EMA swap, a merge of adapters.

The next step must go on from what was written.  Values are compared, because a write through `param.data` leaves no
trace: torch counts writes per tensor, and `data` is another tensor each time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

CHUNK = 2**22
"""Values that are compared at once, so that temporaries do not grow with the parameter."""


class WriteMarks:
    """Tells masters that were written last, as by loading a checkpoint, from those whose weights were."""

    def __init__(self) -> None:
        self._marks: dict[Parameter, tuple[int, int, int]] = {}

    def note(self, param: Parameter, master: Tensor, *, loaded: bool = False) -> None:
        """Remember that weight and master agree.

        Args:
            param: the weight.
            master: its own.
            loaded: the master is of a saved run, and goes before the weight until that is written.
        """
        self._marks[param] = param._version, param.data_ptr(), -1 if loaded else master._version

    def renew(self, masters: Mapping[Parameter, Tensor], survivors: Collection[Parameter]) -> None:
        """Other parameters have masters now; survivors keep their marks, so that writes in the meantime are noticed."""
        self._marks = {param: mark for param, mark in self._marks.items() if param in survivors}
        for param, master in masters.items():
            if param not in self._marks:
                self.note(param, master)

    def master_goes_first(self, param: Parameter, master: Tensor) -> bool:
        """Whether only the master was written since `note`."""
        version, address, of_master = self._marks[param]
        return of_master != master._version and (version, address) == (param._version, param.data_ptr())


@torch.no_grad()
def follow(master: Tensor, weight: Tensor) -> None:
    """Take over the weight's values, in place; where the weight is the rounded master, that keeps what rounding lost.

    Args:
        master: float32 or wider, or of the weight's dtype.
        weight: of the same shape, on any device.
    """
    if master.dtype == weight.dtype:
        master.copy_(weight)
    elif not master.is_contiguous():
        _follow(master, weight)
    else:
        values, written = master.view(-1), weight.reshape(-1)
        for start in range(0, len(values), CHUNK):
            _follow(values[start : start + CHUNK], written[start : start + CHUNK])


def _follow(master: Tensor, weight: Tensor) -> None:
    new = weight.to(master.device)
    rounded = master.to(new.dtype)
    # Mostly nothing was written, which a CPU finds out in half the time; other devices would have to be waited for.
    if master.device.type == "cpu" and torch.equal(rounded, new):
        return
    torch.where(rounded == new, master, new.to(master.dtype), out=master)
