"""What trains when: blocks, their schedule, what always trains and what is corrected, as a value."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from colossal_bcd.block.correction.correction import CorrectionMode, inactive
from colossal_bcd.block.guards import always_active
from colossal_bcd.block.parameters import NamedParameters
from colossal_bcd.block.partition import Block, PrefixList, partition
from colossal_bcd.block.schedule import Mode, Schedule

LoraMode: TypeAlias = Literal["all", "partial", "adapter_only"]

SCHEDULE = tuple(field.name for field in dataclasses.fields(Schedule) if field.name != "drawn")
"""Fields of a schedule that the user decides."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which parameters train after how many applied steps; the same on every rank and mesh."""

    names: tuple[str, ...]
    """Canonical names of everything trainable, in model order."""
    blocks: tuple[Block, ...]
    schedule: Schedule
    always_active: tuple[str, ...] = ()
    """Canonical names of the parameters of `active_modules`, in model order."""
    adapters: frozenset[str] = frozenset()
    """Canonical names of LoRA adapters that train besides the blocks, as `lora_mode` says."""
    lora_mode: LoraMode | None = None
    sgd_mode: CorrectionMode = "disabled"
    options: dict[str, Any] = field(default_factory=dict)
    """What else must be the same in a run that is resumed: plain numbers and strings."""

    def active_blocks(self, num_steps: int) -> tuple[Block, ...]:
        """The blocks that train after `num_steps` applied steps, one per range."""
        return tuple(self.blocks[index] for index in self.schedule.active(num_steps))

    def active_names(self, num_steps: int) -> tuple[str, ...]:
        """Canonical names of what trains then, on any rank, those of `active_modules` included."""
        names = {name for block in self.active_blocks(num_steps) for name in block.parameters}
        if self.lora_mode == "all":
            names |= self.adapters
        elif self.lora_mode == "partial":
            first = min(map(self.names.index, names))
            names |= self.adapters.intersection(self.names[first:])
        names.update(self.always_active)
        return tuple(name for name in self.names if name in names)

    def corrected_names(self, num_steps: int) -> tuple[str, ...]:
        """Canonical names of what is corrected then, on any rank."""
        if self.sgd_mode == "disabled":
            return ()
        return tuple(inactive(self.names, self.active_names(num_steps), self.sgd_mode))

    def trained(self) -> set[str]:
        """Canonical names of what the base optimizer ever trains."""
        besides = self.adapters if self.lora_mode in ("all", "partial") else frozenset()
        return {name for block in self.blocks for name in block.parameters}.union(self.always_active, besides)

    def identity(self) -> dict[str, Any]:
        """What says which parameters train at which step: plain numbers, strings, lists."""
        schedule = self.schedule
        return {
            **{name: getattr(schedule, name) for name in SCHEDULE},
            "ranges": [list(bounds) for bounds in schedule.ranges],
            "blocks": [[block.name, list(block.parameters)] for block in self.blocks],
            "always_active": list(self.always_active),
            **self.options,
        }

    def fingerprint(self, num_steps: int) -> list[int]:
        """Two 62-bit ints: of the blocks and their schedule, and of the progress in it.  Equal on ranks that agree."""
        progress = num_steps, self.schedule.active(num_steps), self.schedule.drawn
        digests = (hashlib.sha256(repr(value).encode()).digest() for value in (self.identity(), progress))
        return [int.from_bytes(digest[:8], "big") >> 2 for digest in digests]


def make_plan(
    roster: NamedParameters,
    *,
    block_prefix_list: PrefixList | None,
    include_embedding: bool,
    include_lm_head: bool,
    n_layer_per_block: int,
    switch_block_every: int,
    switch_mode: Mode,
    start_block: int | None,
    seed: int,
    block_ranges: Sequence[tuple[int, int]] | None,
    active_modules: Sequence[str],
    lora_mode: LoraMode | None,
    sgd_mode: CorrectionMode,
    options: dict[str, Any],
) -> Plan:
    """The plan that the arguments of a BlockOptimizer, which see, ask for.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    blocks = partition(
        roster.parameters,
        aliases=roster.aliases,
        trainable=roster.in_blocks,
        block_prefix_list=block_prefix_list,
        include_embedding=include_embedding,
        include_lm_head=include_lm_head,
        num_layers_per_block=n_layer_per_block,
        merge_seed=seed if switch_mode == "random" else None,
    )
    schedule = Schedule(
        num_blocks=len(blocks),
        period=switch_block_every,
        mode=switch_mode,
        seed=seed,
        start_block=start_block,
        ranges=tuple(block_ranges or ()),
    )
    return Plan(
        names=tuple(name for name in roster.parameters if name in roster.trainable),
        blocks=blocks,
        schedule=schedule,
        always_active=always_active(active_modules, roster),
        adapters=roster.adapters,
        lora_mode=lora_mode,
        sgd_mode=sgd_mode,
        options=options,
    )
