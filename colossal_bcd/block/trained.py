"""The one kind of optimizer that engines, checkpoints, explain and estimate know: a base optimizer and a plan."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.active_set import ActiveSet, MasterMaker
from colossal_bcd.block.correction.correction import CorrectionState, GradientSource
from colossal_bcd.block.importance import Importance
from colossal_bcd.block.partition import Block
from colossal_bcd.block.plan import Plan
from colossal_bcd.block.residual import ResidualOptions
from colossal_bcd.block.schedule import Schedule
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.contract import examine
from colossal_bcd.optim.metrics import Metered, Watched
from colossal_bcd.optim.state.filed import FiledTensor
from colossal_bcd.sharding import Layout
from colossal_bcd.sharding.dtensor import is_dtensor

NO_NEWCOMERS = (
    "add_param_group: got parameters after the blocks were made, expected none. Add them to the base optimizer before "
    "it is wrapped. Where accelerate's FSDP2 has put them there, call colossal_bcd.compat.enable_accelerate() before "
    "the Accelerator is made, and prepare the optimizer without attaching it."
)


class Contributor(Protocol):
    """What has state of its own in what is trained, under a name in `contributors`."""

    def filed(self) -> Iterable[tuple[Parameter, dict[str, Any], Sequence[FiledTensor]]]:
        """State of parameters.

        Returns:
            Working parameter, its state by name, and a description of every tensor in that; the rest of it are plain
            numbers.  Parameters and names are the same on every rank that holds the parameter.
        """

    def numbers(self) -> dict[str, Any]:
        """Plain numbers, strings, and lists and dicts of them; the same on every rank."""

    def load(self, numbers: Mapping[str, Any], saved: Mapping[Parameter, Sequence[str]]) -> None:
        """Take what `numbers` returned, and make room for state, which is then written into what `filed` gives.

        Args:
            numbers: see above.
            saved: parameters of this rank and the tensors that the file has of them.
        """


class Engine(Protocol):
    """What averages gradients, has masters made and writes weights back, for what is active."""

    @property
    def masters(self) -> MasterMaker:
        """Makes masters of parameters."""

    def release(self) -> None:
        """Let go of what is active, before masters are freed."""

    def adopt(self, groups: Sequence[Sequence[Parameter]]) -> None:
        """Serve these parameters of each param group from now on; the active set has their masters."""

    def drive(self, update: Callable[[], None]) -> None:
        """Carry out `step` of what is trained: the update alone where the engine's own step has called it.

        Args:
            update: steps the base optimizer on the gradients of its masters, and counts.
        """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of active parameters and of their masters."""

    def squared_weights(self, blocks: Sequence[Sequence[Parameter]]) -> Tensor:
        """[number of blocks] float64 squared norms of the weights in the model, over all ranks; for "importance"."""


class Trained(Metered):
    """A base optimizer, the plan that says what it trains when, and the active set that it trains now."""

    base_optimizer: Optimizer
    plan: Plan
    """What trains at which step."""
    num_steps: int = 0
    """Applied steps, where the plan depends on them."""
    named_parameters: dict[str, Parameter]
    """Canonical name -> every parameter on this rank that was left trainable, whether in a block or not."""
    members: list[list[Parameter]]
    """Parameters of each param group as the base optimizer was given them, active or not."""
    active_set: ActiveSet
    engine: Engine | None = None
    """What has taken over; it feeds gradients, writes weights back and calls `switch_if_due`."""
    kept: Set[Parameter] = frozenset()
    """Parameters whose masters and state survive switches."""
    residual: ResidualOptions | None = None
    corrector: CorrectionState | None = None
    """Updates what is not active; None: nothing does."""
    importance: Importance | None = None
    """Norms by which blocks are drawn, if they are."""
    contributors: dict[str, Contributor]
    """What has state of its own, for checkpoints."""
    stages: tuple[Sequence[int], ...] = ()
    """Pipeline stages that hold parameters of each block; empty without a pipeline."""
    ranges_given: bool = False
    """Whether the user chose the ranges; a pipeline then leaves them as they are."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.plan.blocks

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    def active_blocks(self) -> tuple[Block, ...]:
        """The blocks that train now, one per range."""
        return self.plan.active_blocks(self.num_steps)

    @property
    def always_active(self) -> tuple[str, ...]:
        """Canonical names of the parameters of `active_modules`, in model order."""
        return self.plan.always_active

    def active_names(self) -> tuple[str, ...]:
        """Canonical names of the parameters that train now, on any rank, those of `active_modules` included."""
        return self.plan.active_names(self.num_steps)

    def corrected_names(self) -> tuple[str, ...]:
        """Canonical names of the parameters that are corrected now, on any rank."""
        return self.plan.corrected_names(self.num_steps)

    def identity(self) -> dict[str, Any]:
        """What says which parameters train at which step: plain numbers, strings, lists."""
        return self.plan.identity()

    def fingerprint(self) -> list[int]:
        """Two 62-bit ints: of the blocks and their schedule, and of the progress in it.  Equal on ranks that agree."""
        return self.plan.fingerprint(self.num_steps)

    def group_names(self, num_steps: int, plan: Plan | None = None) -> list[list[str]]:
        """Names of the parameters that each param group has after `num_steps` applied steps of a plan, in order."""
        active = set((plan or self.plan).active_names(num_steps))
        names = {param: name for name, param in self.named_parameters.items() if name in active}
        return [[names[param] for param in members if param in names] for members in self.members]

    def members_of(self, block: int) -> list[Parameter]:
        """Parameters of a block on this rank."""
        named = self.named_parameters
        return [named[name] for name in self.blocks[block].parameters if name in named]

    def parameters(self) -> list[Parameter]:
        """Every parameter that may be trained or corrected, active or not."""
        return list(self.named_parameters.values())

    def keys(self) -> dict[int, int]:
        """Number of every parameter, by id: its ordinal in the groups as the user gave them, the same on every mesh."""
        return {id(param): key for key, param in enumerate(param for group in self.members for param in group)}

    def updating(self) -> Optimizer:
        """See `Metered`."""
        return self.base_optimizer

    def active_block_names(self) -> tuple[str, ...]:
        """See `Metered`."""
        return () if self.plan.is_whole else tuple(block.name for block in self.active_blocks())

    def watched(self) -> list[Watched]:
        """See `Metered`; masters, under the names of their parameters.

        Raises:
            ValueError: an optimizer that is not this package's updates parts of parameters.
        """
        base, masters = self.base_optimizer, self.active_set.masters
        names = {param: name for name, param in self.named_parameters.items()}
        if isinstance(base, ShardedOptimizer):
            return [Watched(names[param], master, base.layout_of(master)) for param, master in masters.items()]
        if self.engine is not None or any(map(is_dtensor, masters)):
            raise ValueError(
                f"metrics: got a {type(base).__name__}, which does not know of what its tensors are parts, expected an "
                "optimizer of colossal_bcd where parameters are sharded. Wrap colossal_bcd.AdamW, or its like."
            )
        return [Watched(names[param], each, Layout.whole(tuple(each.shape))) for param, each in masters.items()]

    def attach(
        self, engine: Engine, *, held: Iterable[Parameter] | None = None, corrections: GradientSource | None = None
    ) -> None:
        """Let an engine take over; what is active is activated anew, with masters that the engine makes.

        Args:
            engine: see there.
            held: parameters on this rank; others are never activated here.  None: all.
            corrections: brings gradients to the `corrector`.
        """
        raise NotImplementedError

    def switch_if_due(self, agree: Callable[[], None] | None = None) -> bool:
        """Activate the next blocks if the last applied step ended a period; whether it did."""
        return False

    def resume_at(self, num_steps: int, plan: Plan | None = None) -> None:
        """Activate what trains after `num_steps` applied steps, with fresh masters and without state.

        Args:
            num_steps: applied steps.
            plan: to go on with; None: the present one.
        """
        raise NotImplementedError

    def reschedule(self, block_ranges: Sequence[tuple[int, int]], stages: Sequence[Sequence[int]] = ()) -> None:
        """Give the blocks other ranges.

        Args:
            block_ranges: half-open ranges that cover the blocks.
            stages: pipeline stages that hold parameters of each block, for the log; empty without a pipeline.
        """
        raise NotImplementedError

    def _serve(self, engine: Engine, maker: MasterMaker, held: Collection[Parameter] | None) -> None:
        self.engine = engine
        self.active_set.begin_anew(maker)
        if held is not None:
            self.named_parameters = {name: param for name, param in self.named_parameters.items() if param in held}
            self.members = [[param for param in params if param in held] for params in self.members]

    def _hand_over(self, groups: Sequence[Sequence[Parameter]], keep: Set[Parameter]) -> None:
        if self.engine is not None:
            self.engine.release()
        self.active_set.activate(self.base_optimizer, groups, keep)
        if self.engine is not None:
            self.engine.adopt(groups)


class PlainOptimizer(Trained):
    """An optimizer that trains everything in its groups: its plan is one block, which is never switched.

    Args:
        optimizer: any.
        names: of parameters by id; others are named by their ordinals.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str] | None = None) -> None:
        self.base_optimizer = optimizer
        self.members = [list(group["params"]) for group in optimizer.param_groups]
        params = dict.fromkeys(param for group in self.members for param in group)
        named = enumerate(params)
        self.named_parameters = {(names or {}).get(id(param), str(index)): param for index, param in named}
        self.plan, self.active_set, self.contributors = Plan.whole(self.named_parameters), ActiveSet(), {}

    def attach(
        self, engine: Engine, *, held: Iterable[Parameter] | None = None, corrections: GradientSource | None = None
    ) -> None:
        self.active_set.contract = examine(self.base_optimizer)
        # Without a circle, so that an engine is freed, and its hooks with it, as soon as nobody holds it.
        self._serve(weakref.proxy(engine), weakref.proxy(engine.masters), None if held is None else set(held))
        self._hand_over([[param for param in params if param.requires_grad] for params in self.members], frozenset())


def is_plain(optimizer: Any) -> bool:
    """Whether an optimizer has no plan of its own, so that it trains everything in its groups; None is plain, too."""
    return not isinstance(optimizer, Trained) or optimizer.plan.is_whole


def trained_of(optimizer: Optimizer | Trained, names: Mapping[int, str] | None = None) -> Trained:
    """The optimizer as what is trained: itself with a plan of its own, any other with a plan of one block."""
    return optimizer if isinstance(optimizer, Trained) else PlainOptimizer(optimizer, names)
