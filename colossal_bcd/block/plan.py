"""What trains when: blocks, their schedule, what always trains and what is corrected, as a value."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from colossal_bcd.block.correction.correction import CorrectionMode
from colossal_bcd.block.options import BlockOptions, LoraMode, LoraOptions
from colossal_bcd.block.parameters import NamedParameters
from colossal_bcd.block.partition import Block, PrefixList, match, partition
from colossal_bcd.block.schedule import Mode, Schedule

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
    is_whole: bool = False
    """Whether this is the plan of a plain optimizer: one block of everything, which others may join at any time."""

    @classmethod
    def whole(cls, names: Iterable[str]) -> Plan:
        """One block of all these parameters, which is never switched."""
        names = tuple(names)
        schedule = Schedule(num_blocks=1, period=sys.maxsize, mode="fixed")
        return cls(names=names, blocks=(Block("all", names),), schedule=schedule, is_whole=True)

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
        active = set(self.active_names(num_steps))
        # "partial": what comes after the first active one, whose gradient costs little more.
        first = next((i for i, name in enumerate(self.names) if name in active), 0) if self.sgd_mode == "partial" else 0
        return tuple(name for name in self.names[first:] if name not in active)

    def trained(self) -> set[str]:
        """Canonical names of what the base optimizer ever trains."""
        besides = self.adapters if self.lora_mode in ("all", "partial") else frozenset()
        return {name for block in self.blocks for name in block.parameters}.union(self.always_active, besides)

    def always(self) -> frozenset[str]:
        """Canonical names of what trains at every step."""
        return frozenset(self.always_active).union(self.adapters if self.lora_mode == "all" else ())

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

    def progress(self, num_steps: int) -> dict[str, Any]:
        """Where in which schedule a run is after `num_steps` applied steps; plain numbers, strings, lists."""
        where: dict[str, Any] = {"num_steps": num_steps, "identity": self.identity()}
        if self.schedule.drawn:
            where["drawn"] = [[epoch, list(order)] for epoch, order in self.schedule.drawn]
        return where

    def resumed(self, saved: Mapping[str, Any], *, ranges_given: bool = True) -> Plan:
        """This plan with the draws of a saved run, and with its ranges where the user has chosen none.

        Ranges that nobody chose follow from the mesh (one per pipeline stage); a run keeps those with which it began.

        Args:
            saved: what `progress` returned.
            ranges_given: whether the ranges must be the same.
        Raises:
            ValueError: the run has other blocks or another schedule.
        """
        identity = saved["identity"]
        # As both come out of a file, which has lists only.
        ours, theirs = json.loads(json.dumps([self.identity(), identity]))
        if not ranges_given and ours["blocks"] == theirs.get("blocks"):
            ours["ranges"] = theirs.get("ranges")
        _require_identity(ours, theirs)
        ranges = tuple((start, stop) for start, stop in ours["ranges"])
        drawn = tuple((epoch, tuple(order)) for epoch, order in saved.get("drawn", ()))
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, ranges=ranges, drawn=drawn))


def _require_identity(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a state of other blocks or of another schedule; see `Plan.identity`."""
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if not different:
        return
    if "blocks" in different:
        got, expected = [[name for name, _ in identity["blocks"]] for identity in (theirs, ours)]
        detail = f"blocks {got}, expected {expected}" if got != expected else f"the blocks {got} with other parameters"
    else:
        names = {"period": "switch_block_every", "mode": "switch_mode", "ranges": "block_ranges"}
        detail = "; ".join(
            f"{names.get(key, key)} {theirs.get(key)!r}, expected {ours.get(key)!r}" for key in different
        )
    raise ValueError(
        f"load_state_dict: got a state of {detail}. Make the BlockOptimizer with the arguments of the run that saved "
        "it."
    )


def make_plan(
    model: NamedParameters,
    block_prefix_list: PrefixList | None,
    blocks: BlockOptions,
    lora: LoraOptions,
    *,
    switch_block_every: int,
    switch_mode: Mode,
    seed: int,
    active_modules: Sequence[str],
    sgd_mode: CorrectionMode,
    options: dict[str, Any],
) -> Plan:
    """The plan that the arguments of a BlockOptimizer ask for; raises TypeError or ValueError where one is wrong."""
    found = partition(
        model.parameters,
        aliases=model.aliases,
        trainable=model.in_blocks,
        block_prefix_list=block_prefix_list,
        include_embedding=blocks.include_embedding,
        include_lm_head=blocks.include_lm_head,
        num_layers_per_block=blocks.n_layer_per_block,
        merge_seed=seed if switch_mode == "random" else None,
    )
    schedule = Schedule(
        num_blocks=len(found),
        period=switch_block_every,
        mode=switch_mode,
        seed=seed,
        start_block=blocks.start_block,
        ranges=tuple(blocks.block_ranges or ()),
    )
    return Plan(
        names=tuple(name for name in model.parameters if name in model.trainable),
        blocks=found,
        schedule=schedule,
        always_active=_always_active(active_modules, model),
        adapters=model.adapters,
        lora_mode=lora.lora_mode,
        sgd_mode=sgd_mode,
        options=options,
    )


def _always_active(active_modules: Sequence[str], model: NamedParameters) -> tuple[str, ...]:
    """Canonical names of the trainable parameters of `active_modules`, in model order; each has to match some."""
    if isinstance(active_modules, str) or not isinstance(active_modules, Sequence):
        raise TypeError(f"active_modules: got {active_modules!r}, expected a list of prefixes, such as ['lm_head.']")
    found: set[str] = set()
    for prefix in active_modules:
        matched = match(prefix, list(model.parameters), model.aliases, "active module")
        if not matched & model.trainable:
            raise ValueError(
                f"active_modules: {prefix!r} matches {len(matched)} parameters, all frozen before, expected a "
                "trainable one. Unfreeze them or leave the prefix out."
            )
        found |= matched & model.trainable
    return tuple(name for name in model.parameters if name in found)
