"""Base of the optimizers whose bases are refreshed: plan, lazy decisions and reports of captured energy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer
from colossal_bcd.low_rank.refresh_schedule import (
    REFRESH_AT,
    REFRESH_STABLE,
    REFRESH_WAIT,
    Matrix,
    RefreshHyper,
    RefreshTurn,
    is_due,
    offsets,
    owners,
    settle,
)
from colossal_bcd.optim.base import Params, State
from colossal_bcd.sharding import WAVE_BYTES, Layout, Mesh

logger = logging.getLogger(__name__)


class RefreshingOptimizer(ReducedGradientOptimizer):
    """An optimizer that projects gradients on bases and refreshes them now and then.

    The rule calls `refresh_if_due` with its parameter's `turn`.

    Args:
        params: see `ShardedOptimizer`.
        hyper: a `RefreshHyper`.
        wave_bytes: see `ShardedOptimizer`.
    """

    def __init__(self, params: Params, hyper: RefreshHyper, wave_bytes: int = WAVE_BYTES) -> None:
        self._begin()
        super().__init__(params, hyper, wave_bytes)

    def _begin(self) -> None:
        """What must be there before the first param group is added."""
        self._images = {}
        # All projected parameters that this optimizer was ever told of, by key: inactive blocks and other pipeline
        # stages included, so that every rank and mesh makes the same plan.
        self._matrices: dict[int, Matrix] = {}
        self._turns: dict[int, RefreshTurn] | None = None
        self._reports: dict[int, Tensor] = {}
        self._energies: dict[Tensor, Tensor] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._learn(self.param_groups[-1:])

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh, keys: Mapping[Tensor, int] | None = None) -> None:
        super().bind(layouts, mesh, keys)
        self._energies = {param: value for param, value in self._energies.items() if param in self._layouts}
        self._learn(self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._energies = {}
        self._learn(self.param_groups)

    def _update(self) -> None:
        self._reports.clear()
        self._begin_counting()
        super()._update()
        if self._reports:
            self._settle()

    def turn(self, key: int) -> RefreshTurn:
        """Where and when the bases of a projected parameter are refreshed."""
        return self._plan()[key]

    def refresh_due(self, state: State, hyper: RefreshHyper, key: int) -> bool:
        """Whether the update numbered `state["step"]` refreshes the bases, so that it needs the whole gradient.

        Engines ask before the gradient is there.  The answer follows from what all ranks that hold a part of the
        parameter hold alike: hyper-parameters, keys, and plain numbers of the state, the lazy ones of which were read
        from the owner's report.  Replicas agree as long as they compute the same bases from the same gradients.

        Args:
            state: of the parameter, with the number of the update in question, from 1.
            hyper: of its group.
            key: the parameter's number.
        """
        return is_due(state["step"] - 1, state, hyper, self.turn(key).offset)

    def captured_energy(self) -> dict[Tensor, float]:
        """Part of a gradient that the bases keep, in [0, 1], by parameter: |projected|^2 / |gradient|^2.

        That of the gradient from which they were computed, exactly, on every rank that holds a part of the parameter;
        for random bases its mean over all draws.  Not a number after a gradient that was zero or not finite.  Missing
        are parameters that were not refreshed since construction, loading or the switch to their block.  Waits for the
        device.
        """
        return dict(zip(self._energies, _numbers(list(self._energies.values())), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_matrices": self._matrices}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("_matrices", {}), ("_turns", None), ("_reports", {}), ("_energies", {})):
            self.__dict__.setdefault(name, value)

    def _plan(self) -> dict[int, RefreshTurn]:
        if self._turns is None:
            held = {self._keys[param]: layout for param, layout in self._layouts.items()}
            matrices = {key: matrix for key, matrix in self._matrices.items() if key in held}
            offset = offsets(self._matrices.values())
            owner = owners(matrices, held, offset)
            self._turns = {key: RefreshTurn(owner[key], offset[key], self._reports) for key in matrices}
        return self._turns

    def _learn(self, groups: list[dict[str, Any]]) -> None:
        """Take note of the projected parameters in the groups."""
        for group in groups:
            hyper = self.hyper_of(group)
            for param in group["params"]:
                self._matrices.pop(self._keys[param], None)
                if is_projected(self._layouts[param], hyper):
                    shape = self._layouts[param].as_matrix().shape
                    self._matrices[self._keys[param]] = Matrix.of(self._keys[param], shape, hyper)
        self._turns = None

    def _begin_counting(self) -> None:
        """Give state its integers that was made before its group became lazy, as with an older checkpoint."""
        for group in self.param_groups:
            if group["lazy_threshold"] is not None:
                for param in group["params"]:
                    state = self.state.get(param)
                    if state and REFRESH_AT not in state and self._keys.get(param) in self._matrices:
                        state.update({REFRESH_AT: 0, REFRESH_WAIT: 1, REFRESH_STABLE: 0})

    def _settle(self) -> None:
        """Use the reports of this step's refreshes; the device is waited for once, and only where one is read."""
        fresh = {}
        for group in self.param_groups:
            hyper = self.hyper_of(group)
            fresh.update({param: hyper for param in group["params"] if self._keys.get(param) in self._reports})
        reports = [self._reports[self._keys[param]] for param in fresh]
        self._energies.update({param: report[0] for param, report in zip(fresh, reports, strict=True)})
        told = self._mesh.is_first and logger.isEnabledFor(logging.INFO)
        if not told and all(hyper.lazy_threshold is None for hyper in fresh.values()):
            return
        values = _numbers(reports)
        for (param, hyper), (_, alike) in zip(fresh.items(), values, strict=True):
            if hyper.lazy_threshold is not None:
                settle(self.state[param], hyper, self.turn(self._keys[param]).offset, alike)
        if told:
            self._tell([energy for energy, _ in values])

    def _tell(self, energies: list[float]) -> None:
        known = [energy for energy in energies if energy == energy]
        logger.info(
            "bases of %d of %d matrices refreshed, captured energy %s%s",
            len(energies),
            len(self._plan()),
            f"{median(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "unknown",
            f"; {len(energies) - len(known)} gradients zero or not finite" if len(known) < len(energies) else "",
        )


def is_projected(layout: Layout, hyper: RefreshHyper) -> bool:
    """Whether a parameter of this layout is projected."""
    return hyper.rank is not None and len(layout.shape) >= 2


def _numbers(values: list[Tensor]) -> list[Any]:
    """Equal-shaped tensors as Python numbers, with one copy from their device."""
    return torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []
