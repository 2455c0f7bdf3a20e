"""What an engine and its host ask of a block optimizer before its first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set

from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.checks import require_int
from colossal_bcd.block.compiled import CompiledGraphs
from colossal_bcd.block.correction.correction import GradientSource
from colossal_bcd.block.masters import LocalMasters
from colossal_bcd.block.parameters import set_active
from colossal_bcd.block.plan import Plan
from colossal_bcd.block.replicas import Averages
from colossal_bcd.block.trained import Engine, Trained


class Hosted(Trained):
    """Other tensors, other ranges of blocks, another base optimizer, and an engine in the place of the own step."""

    _names: dict[Parameter, str]
    """Name of every parameter of the model, those in no block included."""
    _local: LocalMasters
    _graphs: CompiledGraphs
    _replicas: Averages | None
    _corrections: GradientSource | None

    def attach(
        self, engine: Engine, *, held: Iterable[Parameter] | None = None, corrections: GradientSource | None = None
    ) -> None:
        """See `Trained`.

        Raises:
            ValueError: steps were taken, whose state would be lost, or there is nobody for the corrections.
        """
        if self.num_steps or self.active_set.has_stepped(self.base_optimizer):
            raise ValueError(
                f"attach: the optimizer has taken {self.num_steps} steps, expected none. Boost before the first step."
            )
        if self._corrections is not None:
            if corrections is None:
                raise ValueError("attach: got an engine without corrections, expected some, as sgd_mode asks for them")
            self._corrections.activate([])
            self._corrections = corrections
        if self._replicas is not None:
            self._replicas.detach()
            self._replicas = None
        self._graphs = CompiledGraphs()  # sharding may have moved the parameters to other modules
        here = None if held is None else set(held)
        if here is not None:
            for param in set(self.named_parameters.values()) - here:
                set_active(param, False)
            # Weights of other pipeline stages must not be kept alive.
            self._names = {param: name for param, name in self._names.items() if param in here}
            self._local = LocalMasters(self._names)
        self._serve(engine, engine.masters, here)
        self._activate(keep=frozenset())

    def reschedule(self, block_ranges: Sequence[tuple[int, int]], stages: Sequence[Sequence[int]] = ()) -> None:
        """See `Trained`.

        Raises:
            ValueError: steps were taken, or the ranges do not cover the blocks.
        """
        if self.num_steps:
            raise ValueError(f"reschedule: got it after {self.num_steps} steps, expected it before the first")
        self.stages = tuple(stages)
        schedule = dataclasses.replace(self.schedule, ranges=tuple(block_ranges))
        self.resume_at(0, dataclasses.replace(self.plan, schedule=schedule))

    def resume_at(self, num_steps: int, plan: Plan | None = None) -> None:
        """See `Trained`.

        Raises:
            ValueError: with "importance", the order of that epoch was not drawn here.
        """
        require_int("num_steps", num_steps, 0)
        (plan or self.plan).schedule.active(num_steps)  # raises where that is not known
        self.plan = plan or self.plan
        self._count(num_steps)
        self._activate(keep=frozenset())
        self._log_active()

    def replace_base(self, base_optimizer: Optimizer) -> None:
        """Go on with another base optimizer over the same param-group dicts.

        Raises:
            ValueError: the present one has state, or the groups are others.
        """
        old = self.base_optimizer
        same = len(old.param_groups) == len(base_optimizer.param_groups) and all(
            ours is theirs for ours, theirs in zip(old.param_groups, base_optimizer.param_groups, strict=True)
        )
        if self.active_set.has_stepped(old) or not same:
            raise ValueError(
                f"replace_base: got a {type(base_optimizer).__name__} while the {type(old).__name__} has state of "
                f"{len(old.state)} parameters and {'the same' if same else 'other'} param groups; expected no state "
                "and the same group dicts. Replace it before the first step."
            )
        self._adopt(base_optimizer)

    def point_to(self, named: Mapping[str, Parameter]) -> None:
        """Train other parameters of the same names and shapes: those that `fully_shard` has put in their places.

        Args:
            named: the model's parameters as they are now.
        Raises:
            ValueError: steps were taken, or one is missing or has another shape.
        """
        if self.num_steps or self.active_set.has_stepped(self.base_optimizer):
            raise ValueError(f"point_to: got it after {self.num_steps} steps, expected it before the first")
        for param, name in self._names.items():
            got = tuple(named[name].shape) if name in named else None
            if got != tuple(param.shape):
                raise ValueError(
                    f"point_to: got {got} for parameter {name!r}, expected one of shape {tuple(param.shape)}. Make the "
                    "optimizer from the parameters of this model."
                )
        if self._corrections is not None:
            self._corrections.activate([])
        if self._replicas is not None:
            self._replicas.detach()
        new = {param: named[name] for param, name in self._names.items()}
        self.named_parameters = {name: new[param] for name, param in self.named_parameters.items()}
        self.kept = {new[param] for param in self.kept}
        for group, members in zip(self.base_optimizer.param_groups, self.members, strict=True):
            group["params"] = [new[param] for param in members]
        self._begin(self.base_optimizer, {new[param]: name for param, name in self._names.items()})

    def _begin(self, base_optimizer: Optimizer, names: dict[Parameter, str]) -> None:
        raise NotImplementedError

    def _activate(self, keep: Set[Parameter]) -> None:
        raise NotImplementedError

    def _adopt(self, base_optimizer: Optimizer) -> None:
        raise NotImplementedError

    def _count(self, num_steps: int) -> None:
        raise NotImplementedError

    def _log_active(self) -> None:
        raise NotImplementedError
