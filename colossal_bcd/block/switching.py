"""What changes when other blocks become active: at a switch, under an engine, and where a run goes on."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.checks import require_int
from colossal_bcd.block.compiled import CompiledGraphs
from colossal_bcd.block.copying import CopiedWithModel
from colossal_bcd.block.correction.correction import GradientSource, LocalGradients
from colossal_bcd.block.correction.state import CorrectionState
from colossal_bcd.block.gradient_checkpointing import keep_checkpoints_whole
from colossal_bcd.block.importance import Importance
from colossal_bcd.block.log import active_line, announce
from colossal_bcd.block.masters import Masters
from colossal_bcd.block.parameters import set_active
from colossal_bcd.block.plan import Plan
from colossal_bcd.block.reached import Reach
from colossal_bcd.block.replicas import Averages, averages_for
from colossal_bcd.block.state_dict import Contributor
from colossal_bcd.block.wrapper import Wrapper
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import follow_weights

logger = logging.getLogger(__name__)


class Switching(CopiedWithModel, Wrapper):
    """A wrapper whose base optimizer holds what a plan activates.

    Args:
        base_optimizer: the optimizer inside.
        plan: which parameters train when.
        named_parameters: canonical name -> trainable parameter.
        names: name of every parameter, for errors.
        masters: makes what the base optimizer holds.
        kept: names of parameters whose masters and state survive switches.
        corrector: updates what is not active; None: nothing does.
        importance: norms by which blocks are drawn, if they are.
        verbose: 0 logs nothing, 1 a line per switch, 2 also the names of what trains.
        data_group: processes that train replicas.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        plan: Plan,
        named_parameters: dict[str, Parameter],
        *,
        names: dict[Parameter, str],
        masters: Masters,
        kept: Set[str],
        corrector: CorrectionState | None,
        importance: Importance | None,
        verbose: int,
        data_group: Any = "auto",
    ) -> None:
        super().__init__(base_optimizer, plan, named_parameters)
        self._names, self._data_group = names, data_group
        self._replicas: Averages | None = averages_for(self, data_group, corrector)
        """What averages gradients where there are several processes without an engine."""
        self.verbose = verbose
        self.masters = masters
        self._kept = {named_parameters[name] for name in kept}
        self.importance = importance
        self.contributors: dict[str, Contributor] = {} if importance is None else {"importance": importance}
        """Parts with state of their own, for checkpoints."""
        self.corrector = corrector
        """Updates what is not active; None: nothing does."""
        self._corrections: GradientSource | None = None
        if corrector is not None:
            corrector.adopt(self.named_parameters, list(zip(base_optimizer.param_groups, self.members, strict=True)))
            self._corrections = LocalGradients(corrector, names)
        self.stages: tuple[Sequence[int], ...] = ()
        """Pipeline stages that hold parameters of each block; empty without a pipeline."""
        self.attached = False
        """Whether an engine has taken over; it then feeds gradients, writes weights back and calls `switch_if_due`."""
        if self._tenants.has_stepped(base_optimizer):
            logger.warning("the base optimizer has taken steps; its state is cleared, as at every switch")
        self._reach, self._graphs = Reach(), CompiledGraphs()
        keep_checkpoints_whole()
        self._activate(keep=frozenset())
        self._log_active()

    def switch_if_due(self, agree: Callable[[], None] | None = None) -> bool:
        """Activate the next blocks if the last applied step ended a period; whether it did.

        Must be called once after every applied step.

        Args:
            agree: called before anything is activated, when it is known what will be.
        """
        if not self.schedule.is_switch(self.num_steps):
            return False
        if self.importance is not None:
            schedule = self.importance.end(self.schedule, self.num_steps, self._weights)
            self.plan = dataclasses.replace(self.plan, schedule=schedule)
        if agree is not None:
            agree()
        self._activate(keep=self._kept)
        self._log_active()
        return True

    def attach(
        self, masters: Masters, *, held: Iterable[Parameter] | None = None, corrections: GradientSource | None = None
    ) -> None:
        """Let an engine take over: its masters replace the local ones, and the active blocks are activated anew.

        Args:
            masters: the engine's.
            corrections: the engine's; needed where there is a `corrector`.
            held: parameters on this rank; others are never activated here.  None: all.
        Raises:
            ValueError: steps were taken, whose state would be lost, or there is nobody for the corrections.
        """
        if self.num_steps or self._tenants.has_stepped(self.base_optimizer):
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
        self.masters, self.attached = masters, True
        self._graphs = CompiledGraphs()  # sharding may have moved the parameters to other modules
        if held is not None:
            here = set(held)
            for param in set(self.named_parameters.values()) - here:
                set_active(param, False)
            self.named_parameters = {name: param for name, param in self.named_parameters.items() if param in here}
            self.members = [[param for param in group if param in here] for group in self.members]
            # Weights of other pipeline stages must not be kept alive.
            self._names = {param: name for param, name in self._names.items() if param in here}
        self._activate(keep=frozenset())

    def reschedule(self, block_ranges: Sequence[tuple[int, int]], stages: Sequence[Sequence[int]] = ()) -> None:
        """Give the blocks other ranges.

        Args:
            block_ranges: half-open ranges that cover the blocks.
            stages: pipeline stages that hold parameters of each block, for the log; empty without a pipeline.
        Raises:
            ValueError: steps were taken, or the ranges do not cover the blocks.
        """
        if self.num_steps:
            raise ValueError(f"reschedule: got it after {self.num_steps} steps, expected it before the first")
        self.stages = tuple(stages)
        schedule = dataclasses.replace(self.schedule, ranges=tuple(block_ranges))
        self.plan = dataclasses.replace(self.plan, schedule=schedule)
        self._activate(keep=frozenset())
        self._log_active()

    def resume_at(self, num_steps: int) -> None:
        """Activate what trains after `num_steps` applied steps, with fresh masters and without state.

        Raises:
            ValueError: with "importance", the order of that epoch was not drawn here.
        """
        require_int("num_steps", num_steps, 0)
        self.schedule.active(num_steps)  # raises where that is not known
        self._count(num_steps)
        self._activate(keep=frozenset())
        self._log_active()

    def _activate(self, keep: Set[Parameter]) -> None:
        """Freeze and unfreeze, and hand the active masters to the base optimizer; old ones are freed first."""
        names, corrected = set(self.active_names()), set(self.corrected_names())
        active = {param for name, param in self.named_parameters.items() if name in names}
        for name, param in self.named_parameters.items():
            set_active(param, name in names or name in corrected)
        num_sets = math.prod(max(stop - start, 1) for start, stop in self.schedule.ranges)
        self._graphs.renew(self.named_parameters.values(), num_sets)
        groups = [[param for param in members if param in active] for members in self.members]
        self._tenants.replace(self.base_optimizer, self.masters, groups, keep)
        if self.attached:
            self.masters.bind()
        elif isinstance(self.base_optimizer, ShardedOptimizer):
            self._tenants.bind_whole(self.base_optimizer, self.members)
        else:
            follow_weights(self.base_optimizer, self._tenants.tensors)
        following = [param for name, param in self.named_parameters.items() if name in corrected]
        if self._replicas is not None:
            self._replicas.activate([param for param in self.named_parameters.values() if param in active], following)
        elif self._corrections is not None:
            self._corrections.activate(following)
        if self.importance is not None:
            indices = self.schedule.active(self.num_steps)
            self.importance.begin(indices, [self._members_of(index) for index in indices])

    def replica_names(self) -> Mapping[Parameter, str]:
        """See `ReplicaClient`."""
        return self._names

    def take_averages(self, averages: Mapping[Parameter, Tensor]) -> None:
        """See `ReplicaClient`."""
        for param, grad in averages.items():
            param.grad = grad.view(param.shape)

    def _average(self) -> None:
        """Before a step: average what waits, and gradients of backward passes that nobody has seen."""
        if self._replicas is None:
            self._replicas = averages_for(self, self._data_group, self.corrector)
            if self._replicas is None:
                return
            if self.corrector is not None:
                raise ValueError(
                    f"sgd_mode={self.corrector.mode!r}: got a process group of several processes after the optimizer "
                    "was made, when gradients had been applied on this process alone; expected it before. Call "
                    "torch.distributed.init_process_group first."
                )
            active = self._tenants.tensors
            self._replicas.activate([param for param in self.named_parameters.values() if param in active])
        self._replicas.settle()

    def _note_reach(self) -> None:
        """Before a step, when every master has its gradient; the masters of an engine have that of any rank."""
        tensors, named, groups, grouped = self._tenants.tensors, self.named_parameters, {}, set[Parameter]()
        for block in self.active_blocks():
            # Whether the schedule is that of the other ranks is found out at the switch, not here.
            members = {name: named[name] for name in block.parameters if named.get(name) in tensors}
            groups[block.name] = {name: tensors[param].grad is not None for name, param in members.items()}
            grouped.update(members.values())
        others = any(tensor.grad is not None for param, tensor in tensors.items() if param not in grouped)
        self._reach.note(self.num_steps, groups, others)
        if self.schedule.is_switch(self.num_steps + 1) and not self.stages:
            self._reach.end(groups, [block.name for block in self.blocks])

    def _members_of(self, block: int) -> list[Parameter]:
        """Parameters of a block on this rank."""
        named = self.named_parameters
        return [named[name] for name in self.blocks[block].parameters if name in named]

    def _weights(self, blocks: Sequence[int]) -> Tensor:
        return self.masters.squared_weights([self._members_of(block) for block in blocks])

    def _count(self, num_steps: int) -> None:
        self.num_steps = num_steps
        if self.corrector is not None:
            self.corrector.num_steps = num_steps

    def _log_active(self) -> None:
        if not self.verbose:
            return
        active, names = self.schedule.active(self.num_steps), [block.name for block in self.blocks]
        self._report(active_line(self.num_steps, active, names, self.stages))
        if self.verbose >= 2:
            self._report(f"trainable: {', '.join(self.active_names())}")

    def _report(self, message: str) -> None:
        announce(message)
