"""Which blocks are active at which step: a pure function of the schedule and of the number of applied steps.

So are learning rates, which grow to their value after a switch.

n: blocks of a range.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from colossal_bcd.block.checks import require_choice, require_int

Mode: TypeAlias = Literal["random", "ascending", "descending", "fixed", "importance"]
Ranges: TypeAlias = tuple[tuple[int, int], ...]
Drawn: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Order of the blocks.

    A period is `period` applied optimizer steps with one active block per range.  An epoch of a range is as many
    periods as the range has blocks; each of them is active once in it (but for "fixed" and "importance").  Nothing is
    drawn from a global generator, so every process that knows the numbers knows the order.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is out of range, `mode` is unknown, or the ranges do not cover all blocks in order.
    """

    num_blocks: int
    period: int
    """Applied optimizer steps between two switches."""
    mode: Mode = "random"
    """"random": a new permutation every epoch; "ascending", "descending": by index, wrapping; "fixed": one block;
    "importance": see `draw`."""
    seed: int = 0
    start_block: int | None = None
    """First active block of the range that it is in; None: the first one by the order."""
    ranges: Ranges = ()
    """Half-open ranges of blocks, each with its own order and its own active block; (): one over all blocks."""
    drawn: Drawn = ()
    """For "importance", by range: the epoch that was drawn last, and its order; (): the first epoch goes on."""

    def __post_init__(self) -> None:
        require_int("number of blocks", self.num_blocks, 1)
        require_int("switch_block_every", self.period, 1)
        require_choice("switch_mode", self.mode, get_args(Mode))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed: got {self.seed!r} of type {type(self.seed).__name__}, expected an int")
        if self.start_block is not None:
            require_int("start_block", self.start_block, 0)
            if self.start_block >= self.num_blocks:
                raise ValueError(
                    f"start_block: got {self.start_block}, expected an index of one of the {self.num_blocks} blocks, "
                    f"0 to {self.num_blocks - 1}"
                )
        if not all(isinstance(bounds, Sequence) and len(bounds) == 2 for bounds in self.ranges):
            raise TypeError(f"block_ranges: got {self.ranges!r}, expected pairs (start, stop) such as ((0, 2), (2, 4))")
        ranges = tuple((start, stop) for start, stop in self.ranges) or ((0, self.num_blocks),)
        object.__setattr__(self, "ranges", ranges)
        bounds = [0]
        for start, stop in ranges:
            require_int("block_ranges", start, 0)
            require_int("block_ranges", stop, 0)
            if start != bounds[-1] or stop < start:
                break
            bounds.append(stop)
        if len(bounds) != len(ranges) + 1 or bounds[-1] != self.num_blocks:
            raise ValueError(
                f"block_ranges: got {ranges}, expected half-open ranges, one after the other, that cover the "
                f"{self.num_blocks} blocks, such as ((0, {self.num_blocks}),)"
            )

    def order(self, range_index: int, epoch: int) -> tuple[int, ...]:
        """Indices of the blocks of a range in the order in which they are active in an epoch; "fixed": just one."""
        start, stop = self.ranges[range_index]
        blocks = list(range(start, stop))
        first = self.start_block if self.start_block in blocks else None
        if self.mode == "fixed":
            return (first if first is not None else start,) if blocks else ()
        if self.mode == "importance" and epoch > 0 and len(blocks) > 1:
            return self._drawn_order(range_index, epoch)
        if self.mode in ("random", "importance"):
            # A str seed goes through SHA-512, independent of PYTHONHASHSEED and of the platform.
            random.Random(f"blocks {start}-{stop} of seed {self.seed}, epoch {epoch}").shuffle(blocks)
            if first is not None and epoch == 0:
                blocks.remove(first)
                blocks.insert(0, first)
            return tuple(blocks)
        if self.mode == "descending":
            blocks.reverse()
        turn = blocks.index(first) if first is not None else 0
        return tuple(blocks[turn:] + blocks[:turn])

    def active(self, num_steps: int) -> tuple[int, ...]:
        """Indices of the blocks that are active in the step that follows `num_steps` applied steps.

        One per range that has blocks, in the order of the ranges.
        """
        turn = num_steps // self.period
        active = []
        for index, (start, stop) in enumerate(self.ranges):
            if start < stop:
                epoch, position = divmod(turn, stop - start)
                order = self.order(index, epoch)
                active.append(order[position % len(order)])
        return tuple(active)

    def is_switch(self, num_steps: int) -> bool:
        """Whether a period ends with the applied step that makes them `num_steps`."""
        return num_steps > 0 and num_steps % self.period == 0

    def epochs_that_begin(self, num_steps: int) -> tuple[int, ...]:
        """Indices of the ranges whose order is to be drawn after `num_steps` applied steps; follows from numbers."""
        if self.mode != "importance" or not self.is_switch(num_steps):
            return ()
        turn = num_steps // self.period
        sizes = [stop - start for start, stop in self.ranges]
        return tuple(index for index, size in enumerate(sizes) if size > 1 and turn % size == 0)

    def draw(self, num_steps: int, norms: Sequence[float | None], floor: float) -> Schedule:
        """This schedule with the orders of the epochs that begin after `num_steps` applied steps.

        The n blocks of an epoch are drawn with replacement; see `probabilities`.  The first epoch is a permutation.

        Args:
            num_steps: see above.
            norms: of all blocks, the same on every process; None: not known.
            floor: share of the probability that all blocks of a range have in equal parts.
        """
        drawn = list(self.drawn or ((0, ()),) * len(self.ranges))
        for index in self.epochs_that_begin(num_steps):
            start, stop = self.ranges[index]
            epoch = num_steps // self.period // (stop - start)
            generator = random.Random(f"blocks {start}-{stop} of seed {self.seed}, epoch {epoch}, by importance")
            weights = probabilities(norms[start:stop], floor)
            drawn[index] = epoch, tuple(generator.choices(range(start, stop), weights, k=stop - start))
        return dataclasses.replace(self, drawn=tuple(drawn))

    def _drawn_order(self, range_index: int, epoch: int) -> tuple[int, ...]:
        known, order = self.drawn[range_index] if self.drawn else (0, ())
        if known != epoch:
            start, stop = self.ranges[range_index]
            raise ValueError(
                f"switch_mode='importance': got a step in epoch {epoch} of blocks {start} to {stop - 1}, expected one "
                f"in epoch {known}, whose order is known: orders are drawn from norms when an epoch begins. Load the "
                "state of a run that is there."
            )
        return order


def probabilities(norms: Sequence[float | None], floor: float) -> list[float]:
    """[n] probability of each block: proportional to its norm, plus an equal part of `floor`.

    A norm that is not known counts as the largest one that is.
    """
    largest = max((norm for norm in norms if norm is not None), default=1.0)
    filled = [largest if norm is None else norm for norm in norms]
    total = sum(filled)
    if total == 0:
        return [1 / len(norms)] * len(norms)
    return [(1 - floor) * norm / total + floor / len(norms) for norm in filled]


def warm_up(num_steps: int, period: int, num_warm: int) -> float:
    """Factor of the learning rate in the step that follows `num_steps` applied ones.

    The first `num_warm` steps of a run have factor 1; after every switch the factor grows linearly to 1 over as many.
    """
    return 1.0 if num_steps < num_warm else min(1.0, (num_steps % period + 1) / max(num_warm, 1))


@contextlib.contextmanager
def scaled_rates(groups: Sequence[dict[str, Any]], factor: float) -> Iterator[None]:
    """Param groups with learning rates times `factor`; schedulers see the old ones afterwards."""
    if factor == 1:
        yield
        return
    rates = [group["lr"] for group in groups]
    try:
        for group in groups:
            group["lr"] = group["lr"] * factor
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
