"""What else has tensors to be saved: corrections of inactive blocks, residuals, what a block optimizer names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.nn import Parameter

from colossal_bcd.block.correction.correction import CorrectionState
from colossal_bcd.block.trained import Contributor
from colossal_bcd.checkpoint.trained import Boosted
from colossal_bcd.engine.masters import ShardedMasters
from colossal_bcd.optim.state.filed import FiledTensor, filed_like


def contributors_of(boosted: Boosted) -> dict[str, Contributor]:
    """Find contributors by name: those in `optimizer.contributors`, corrections of inactive blocks, residuals."""
    trained = boosted.trained
    found = dict(trained.contributors)
    if trained.corrector is not None:
        found["correction"] = SavedCorrection(trained.corrector)
    if trained.residual is not None:
        found["residual"] = ResidualState(boosted.wrapper.masters)
    return found


class SavedCorrection:
    """State of corrections, which is the same on all data-parallel ranks: that of whole local weights.

    Args:
        correction: what has the state.
    """

    def __init__(self, correction: CorrectionState) -> None:
        self._correction = correction

    def filed(self) -> Iterator[tuple[Parameter, dict[str, Any], Sequence[FiledTensor]]]:
        """See `Contributor`."""
        for param, state in self._correction.state.items():
            yield param, state, self._correction.filed(param)

    def numbers(self) -> dict[str, Any]:
        """See `Contributor`."""
        return {"num_steps": self._correction.num_steps}

    def load(self, numbers: Mapping[str, Any], saved: Mapping[Parameter, Sequence[str]]) -> None:
        """See `Contributor`."""
        self._correction.num_steps = numbers["num_steps"]
        self._correction.allocate(saved)


class ResidualState:
    """What rounding has taken off the masters of inactive parameters.

    Args:
        masters: masters of the engine.
    """

    def __init__(self, masters: ShardedMasters) -> None:
        self._masters = masters

    def filed(self) -> Iterator[tuple[Parameter, dict[str, Any], Sequence[FiledTensor]]]:
        """See `Contributor`."""
        for param, tensor in self._masters.active_set.residuals.of.items():
            yield param, {"value": tensor}, [filed_like("value", tensor, self._masters.layout(param))]

    def numbers(self) -> dict[str, Any]:
        """See `Contributor`."""
        return {}

    def load(self, numbers: Mapping[str, Any], saved: Mapping[Parameter, Sequence[str]]) -> None:
        """See `Contributor`."""
        residuals = self._masters.active_set.residuals
        residuals.of = {param: residuals.empty(param, self._masters.layout(param).local_shape) for param in saved}
