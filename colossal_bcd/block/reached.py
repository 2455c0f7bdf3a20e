"""Whether backward reaches what trains: an active block without any gradient trains nothing."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from colossal_bcd.sharding import Mesh

logger = logging.getLogger(__name__)

CAUSES = (
    "Either the forward pass used none of it, as an image tower in steps of text, or something cut the graph: "
    "torch.no_grad() or detach() in the model, or reentrant gradient checkpointing by another function than torch's "
    "(use a non-reentrant one, or model.enable_input_require_grads())."
)


class Reach:
    """Notes which groups of parameters (blocks, or layers, as `noun` says) get gradients; says once what gets none.

    What it is told must be the same on all data-parallel ranks: whether any of them has a gradient.
    """

    def __init__(self, noun: str = "block") -> None:
        self._noun = noun
        self._said: set[str] = set()
        self._without: set[str] = set()
        """Groups whose period has ended without a gradient, as long as no group ever had one."""
        self._ever, self._others = False, False

    def note(self, step: int, groups: Mapping[str, Mapping[str, bool]], others: bool) -> None:
        """Look at a step, and say at its first occurrence that a group, or a part of one, has no gradient.

        Args:
            step: its number, for the line.
            groups: group -> name -> whether the parameter has a gradient.
            others: whether something that is in no group has one.
        """
        self._others |= others
        for group, had in groups.items():
            missing = [name for name, present in had.items() if not present]
            self._ever |= len(missing) < len(had)
            subject = f"parameters of {self._noun} {group}"
            if had and len(missing) == len(had):
                self._say("all", logging.WARNING, f"step {step}: none of the {subject} has a gradient. {CAUSES}")
            elif missing:
                names = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
                text = f"step {step}: {len(missing)} of {len(had)} {subject} have no gradient: {names}"
                self._say("some", logging.INFO, text)

    def end(self, ended: Collection[str], every: Sequence[str]) -> None:
        """Refuse to go on where every group has had its period and none has had a gradient, but something else has.

        Args:
            ended: groups whose period ends.
            every: all groups.
        Raises:
            ValueError: see above.
        """
        if self._ever:
            return
        self._without.update(ended)
        if self._others and self._without.issuperset(every):
            raise ValueError(
                f"every one of the {len(every)} {self._noun}s was active, and none got a gradient in any step, while "
                f"other parameters got some: backward does not reach the {self._noun}s. {CAUSES}"
            )

    def _say(self, kind: str, level: int, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            if Mesh().is_first:
                logger.log(level, message)
