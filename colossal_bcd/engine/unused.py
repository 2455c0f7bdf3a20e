"""Weights that are trained now and had no gradient on any rank."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import torch.distributed as dist
from torch.nn import Parameter

logger = logging.getLogger(__name__)


class Unused:
    """Says once that weights were left as they are, because no batch of a step used them.

    Args:
        names: of all parameters, by id.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._said = False

    def note(self, trained: Collection[Parameter], grads: Collection[Parameter]) -> None:
        """Compare what trains with what had a gradient on any rank; both are known on the host.

        Args:
            trained: parameters that have masters.
            grads: those of which there is an averaged gradient.
        """
        if self._said:
            return
        unused = [self._names.get(id(param), "?") for param in trained if param.requires_grad and param not in grads]
        if not unused:
            return
        self._said = True
        if dist.get_rank() == 0:
            logger.warning(
                "%s trained parameters had no gradient on any rank in this step, such as %s, and stay as they are "
                "until they have one. That is right where no batch used them. If the model uses gradient "
                "checkpointing, pass use_reentrant=False: the reentrant kind cuts the graph above frozen layers.",
                len(unused),
                unused[0],
            )
