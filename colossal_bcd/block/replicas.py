"""Processes that train replicas of a model where no engine does it for them: torch's DDP, accelerate, plain loops.

What averages their gradients is in engine/, which this folder does not know; it is found there by name, and only where
there are several processes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.correction.correction import CorrectionState
from colossal_bcd.sharding import LowRankGradient, Mesh

AVERAGES = "colossal_bcd.engine.replicas", "ReplicaAverages"
"""Module and name of what averages."""


class ReplicaClient(Protocol):
    """The optimizer whose gradients are averaged."""

    def replica_names(self) -> Mapping[Parameter, str]:
        """All parameters of the model, which must be equal on all replicas, and their names."""

    def fingerprint(self) -> list[int]:
        """Ints below 2**62 that are equal on ranks that train the same in the same order."""

    def take_averages(self, averages: Mapping[Parameter, Tensor]) -> None:
        """Take what all ranks have: flat gradients, or the low-rank ones that were asked for instead."""


class Averages(Protocol):
    """Averages of the gradients of what is active over the processes."""

    def activate(
        self,
        active: Sequence[Parameter],
        corrected: Sequence[Parameter] = (),
        low_rank: Mapping[Parameter, LowRankGradient] = ...,
    ) -> None:
        """From now on average the gradients of exactly these parameters.

        Args:
            active: their averages are handed to the client, when backward ends.
            corrected: theirs go to the `CorrectionState`, within backward.
            low_rank: what to average instead of the gradient, of the active ones that are in it.
        """

    def settle(self) -> None:
        """Before a step: average what waits, such as gradients of backward passes under `no_sync`."""

    def clear(self) -> None:
        """Forget gradients that wait."""

    def agree(self) -> None:
        """At a switch: raise on all ranks if the weights that have trained or the schedules differ."""

    def detach(self) -> None:
        """Take no part any more."""


def averages_for(
    client: ReplicaClient, data_group: Any, correction: CorrectionState | None = None, *, alone: bool = False
) -> Averages | None:
    """What averages the gradients of this optimizer; None on one process.

    If `alone`, one process of a group has it, too: there it only puts torch's DDP to rest.

    Raises:
        ValueError: `data_group` is no process group, or, on several processes, a parameter is a part of one.
    """
    if not (data_group in ("auto", None) or hasattr(data_group, "rank")):
        raise ValueError(
            f"data_group: got {data_group!r}, expected 'auto', a process group of torch.distributed, or None, with "
            "which every process trains on its own"
        )
    if not (_several() or (alone and data_group is not None and Mesh.has_world())):
        return None
    module, name = AVERAGES
    made: Averages = getattr(importlib.import_module(module), name)(client, data_group, correction)
    return made


def _several() -> bool:
    """Whether there are other processes, or a launcher says that there will be."""
    return Mesh.world("data").size("data") > 1 or os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
