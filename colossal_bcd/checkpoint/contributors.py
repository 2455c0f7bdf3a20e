"""Parts of a block optimizer that have state of their own."""

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
    """By name: those in `optimizer.contributors`, and the corrections of inactive blocks."""
    trained = boosted.trained
    parts = dict(trained.contributors)
    if trained.corrector is not None:
        parts["correction"] = SavedCorrections(trained.corrector)
    if trained.residual is not None:
        parts["residual"] = ResidualState(boosted.wrapper.masters)
    return parts


class SavedCorrections:
    """State of corrections: of whole local weights, the same on all data-parallel ranks.

    Args:
        corrector: whose state it is.
    """

    def __init__(self, corrector: CorrectionState) -> None:
        self._corrector = corrector

    def filed(self) -> Iterator[tuple[Parameter, dict[str, Any], Sequence[FiledTensor]]]:
        """See `Contributor`."""
        for param, state in self._corrector.state.items():
            yield param, state, self._corrector.filed(param)

    def numbers(self) -> dict[str, Any]:
        """See `Contributor`."""
        return {"num_steps": self._corrector.num_steps}

    def load(self, numbers: Mapping[str, Any], saved: Mapping[Parameter, Sequence[str]]) -> None:
        """See `Contributor`."""
        self._corrector.num_steps = numbers["num_steps"]
        self._corrector.allocate(saved)


class ResidualState:
    """What rounding has cut off the masters of inactive parameters.

    Args:
        masters: the engine's.
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
