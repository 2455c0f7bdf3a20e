"""Block coordinate descent around any optimizer: BAdam (arXiv 2404.02827, algorithm 1) when that is Adam.

A step on one process, and who does what in it (under an engine, the engine does all but the lines marked *):

    backward            gradients of active parameters; the corrections update what is not active and free its gradient
    step    replicas    average the gradients over processes, if there are several
            masters     get the gradients                                                       masters.py
          * base        steps on its masters, its learning rates warmed up after a switch
            weights     get the masters' values                                                 masters.py
          * switch      if a period ends: the plan says what trains now, the active set         plan.py, active_set.py
                        exchanges masters and state
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.active_set import ActiveSet
from colossal_bcd.block.checks import (
    refuse_torch_checkpoint,
    require_base,
    require_counts_apart,
    require_int,
    require_rates,
    require_same_groups,
    require_same_parameters,
    require_same_shapes,
)
from colossal_bcd.block.compiled import CompiledGraphs
from colossal_bcd.block.correction.by_optimizer import OptimizerCorrection
from colossal_bcd.block.correction.correction import GradientSource, LocalGradients
from colossal_bcd.block.correction.rules import Correction
from colossal_bcd.block.gradient_checkpointing import keep_checkpoints_whole
from colossal_bcd.block.importance import Importance, ImportanceOptions, Norm, squared_norms
from colossal_bcd.block.log import active_line, announce, blocks_line
from colossal_bcd.block.masters import LocalMasters
from colossal_bcd.block.options import CorrectionOptions, LoraOptions, Options
from colossal_bcd.block.parameters import read_parameters, set_active
from colossal_bcd.block.partition import PrefixList
from colossal_bcd.block.plan import Plan, make_plan
from colossal_bcd.block.replicas import Averages, averages_for
from colossal_bcd.block.residual import ResidualOptions
from colossal_bcd.block.schedule import Mode, scaled_rates, warm_up
from colossal_bcd.block.state_dict import NOT_ALONE, deep_copy, load_state, take_state
from colossal_bcd.block.trained import NO_NEWCOMERS, Engine, Trained
from colossal_bcd.block.untrained import Reach, warn_of_heads
from colossal_bcd.optim.foreign.bitsandbytes_states import remember_weights
from colossal_bcd.optim.foreign.contract import examine
from colossal_bcd.sharding.dtensor import is_dtensor

logger = logging.getLogger(__name__)


class BlockOptimizer(Trained, Optimizer):
    """Trains one block of a model at a time with the base optimizer and freezes the rest.

    After exactly `switch_block_every` applied steps the next block becomes active: the base optimizer's state is
    cleared (also where the next block is the same one) and, for bfloat16 and float16 weights, float32 masters are
    cloned from the new block's weights.  A step skipped by a loss scaler counts for nothing.  Gradients are consumed by
    the step.

    `param_groups` is the base optimizer's list with the same dicts for ever, so schedulers of either optimizer, made
    before or after, act on both; learning rate and weight decay are per group, as given to the base optimizer.  Only
    `group["params"]` changes: it holds the active masters.

    What was frozen before stays frozen and is in no block; what is in no block is frozen.  A wrapped model can be
    wrapped again, a `copy.deepcopy` of it alone cannot: torch copies no record of who froze what.  Both are copied by
    `copy.deepcopy((model, optimizer))`.  In a model with LoRA
    adapters blocks train the adapters only.  A head tied to the embedding is in one block: the embedding's with
    `include_embedding`, else the head's with `include_lm_head`; it is never trained unasked.

    Args:
        base_optimizer: optimizer over the model's parameters; any but LBFGS.
        named_parameters_list: pairs as of `model.named_parameters()`; two names for one tensor are a tie.
        block_prefix_list: the blocks, each a list of prefixes of parameter names (or one prefix); a prefix is whole
            components from the start of a name.  None: one block per layer.
        switch_block_every: applied steps per block, K in the paper.
        switch_mode: "random" (a new permutation every epoch of blocks), "ascending", "descending", "fixed" (one block),
            or "importance" (as many draws an epoch as there are blocks, by their norms; the first is a permutation).
        active_modules: prefixes of parameters that always train, adapters or not; their masters and state survive
            switches.
        seed: of the orders; the same on every process.
        lora: BREAD's adapters, in a model of peft; None: fields of `LoraOptions` are taken from `flat`.
        correction: BREAD's update of what is not active: a rule, or `CorrectionOptions`; None: see these.
        residual: "keep" what rounding cuts off a master at a switch, of bfloat16 and float16 weights that have trained;
            or `ResidualOptions`, which keeps it, too.
        importance: norms by which "importance" draws: of "gradient" or "weight"; or `ImportanceOptions`.
        flat: fields of `BlockOptions`, `LoraOptions` and `CorrectionOptions` by their names, and `residual_bits`,
            `residual_offload`, `importance_floor`.
    Raises:
        TypeError, ValueError: an argument is wrong; the model and the base optimizer are then as before.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        named_parameters_list: Iterable[tuple[str, Parameter]],
        block_prefix_list: PrefixList | None = None,
        *,
        switch_block_every: int = 50,
        switch_mode: Mode = "random",
        active_modules: Sequence[str] = (),
        seed: int = 0,
        lora: LoraOptions | None = None,
        correction: CorrectionOptions | Correction | OptimizerCorrection | None = None,
        residual: ResidualOptions | Literal["drop", "keep"] = "drop",
        importance: ImportanceOptions | Norm = "gradient",
        **flat: Any,
    ) -> None:
        if isinstance(base_optimizer, Trained):
            raise ValueError("base_optimizer: got a BlockOptimizer, expected the optimizer that it wraps. Wrap once.")
        contract = require_base(base_optimizer)
        options = Options.read(
            flat, lora=lora, correction=correction, residual=residual, importance=importance, switch_mode=switch_mode
        )
        self.residual, self.corrector = options.residual, options.correction.build(seed)
        model = read_parameters(named_parameters_list, options.lora.lora_mode)
        plan = make_plan(
            model,
            block_prefix_list,
            options.blocks,
            options.lora,
            switch_block_every=switch_block_every,
            switch_mode=switch_mode,
            seed=seed,
            active_modules=active_modules,
            sgd_mode=options.correction.sgd_mode,
            options=options.identity(self.corrector),
        )
        trained, self.warm_up_steps = plan.trained(), options.blocks.lr_warmup_step_afterswitch
        require_same_parameters(base_optimizer, model, trained if self.corrector is None else model.trainable)
        if self.warm_up_steps or self.corrector is not None:
            require_rates(base_optimizer, "lr_warmup_step_afterswitch" if self.corrector is None else "sgd_mode")
        names = {param: name for name, param in model.parameters.items()}
        kept = frozenset(plan.always_active).union(model.adapters if options.lora.keeps else ())
        groups = [[names[param] for param in group["params"]] for group in base_optimizer.param_groups]
        require_counts_apart(contract, groups, trained, kept, plan.always())
        # The empty group satisfies torch's constructor without a change to the base optimizer's groups.
        Optimizer.__init__(self, [{"params": []}], base_optimizer.defaults)
        self.plan = plan
        self.named_parameters = {name: model.parameters[name] for name in plan.names}
        self.kept = {self.named_parameters[name] for name in kept}
        self.importance = None if options.importance is None else Importance(options.importance, len(plan.blocks))
        self.contributors = {} if self.importance is None else {"importance": self.importance}
        self.ranges_given = options.blocks.block_ranges is not None
        self.verbose, self._data_group = options.blocks.verbose, options.blocks.data_group
        self._begin(base_optimizer, names)
        if self.corrector is None and block_prefix_list is None:
            warn_of_heads(model.parameters, model.trainable - trained)
        self._report_blocks(len(model.parameters), trained)

    def _begin(self, base_optimizer: Optimizer, names: dict[Parameter, str]) -> None:
        """Take over the base optimizer, and activate the first blocks."""
        self.members = [list(group["params"]) for group in base_optimizer.param_groups]
        self.active_set, self._local, self.stages = ActiveSet(self.residual), LocalMasters(names), ()
        self.active_set.begin_anew(self._local)
        self._adopt(base_optimizer)
        self._names, self._reach, self._graphs = names, Reach(), CompiledGraphs()
        self._replicas: Averages | None = self._found_replicas(alone=True)
        """What averages gradients where there are several processes without an engine."""
        self._corrections: GradientSource | None = None
        if self.corrector is not None:
            groups = zip(base_optimizer.param_groups, self.members, strict=True)
            self.corrector.adopt(self.named_parameters, list(groups))
            self._corrections = LocalGradients(self.corrector, names)
        if self.active_set.has_stepped(base_optimizer):
            logger.warning("the base optimizer has taken steps; its state is cleared, as at every switch")
        keep_checkpoints_whole()
        self._activate(keep=frozenset())
        self._log_active()

    def _report_blocks(self, num_parameters: int, trained: Set[str]) -> None:
        if self.verbose:
            others = sum(name not in trained for name in self.named_parameters)
            mode = None if self.corrector is None else self.corrector.mode
            self._report(blocks_line(len(self.blocks), others, num_parameters - len(self.named_parameters), mode))

    @property
    def attached(self) -> bool:
        """Whether an engine has taken over."""
        return self.engine is not None

    @property
    def state(self) -> Any:
        """State of the base optimizer, by what its groups hold."""
        save = "torch.save(optimizer.state_dict(), path)"
        if self.engine is not None:
            save = "dcp.save({..., 'optim': colossal_bcd.fsdp.Checkpointable(engine)}, ...)"
        refuse_torch_checkpoint(type(self).__name__, f"Use {save}.")
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the active blocks, then the switch if one is due.

        Raises:
            ValueError: a gradient is sparse, the model was moved or converted, the base optimizer was given more
                parameters, or a closure comes while an engine feeds the gradients.
        """
        if self.engine is not None:
            if closure is not None:
                raise ValueError("closure: got one under an engine, expected None. Compute the loss before the step.")
            self.engine.drive(self._base_step)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.require_no_newcomers()
        self._average()
        self._local.load_gradients(self.active_set)
        if self._corrections is not None:
            self._corrections.settle()
        if self.importance is not None and self.importance.by_gradient:
            self.importance.note_local(self.active_set.masters)
        self._base_step()
        self._local.write_back(self.active_set)
        self.switch_if_due(None if self._replicas is None else self._replicas.agree)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What `torch.amp.GradScaler` asks before it steps.

        Raises:
            ValueError: corrections were made within backward, of gradients that it had scaled.
        """
        if self.corrector is not None:
            raise ValueError(
                f"sgd_mode={self.corrector.mode!r}: got a torch.amp.GradScaler, whose scaled gradients are applied "
                "within backward, expected none. Use bfloat16 without a scaler, or fp16 under a plugin of "
                "colossal_bcd.booster, which undoes the scale."
            )
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.engine is not None:
            self.engine.zero_grad(set_to_none)
        else:
            self._local.zero_grad(self.active_set, set_to_none)
        for gradients in (self._corrections, self._replicas):
            if gradients is not None:
                gradients.clear()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, and under "block" what resumes in the middle of a block.

        Tensors are not copied.  `torch.load(weights_only=True)` can read it.

        Raises:
            ValueError: an engine holds the masters.
        """
        return take_state(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where the state was taken; the model's weights are loaded apart, before or after.

        Raises:
            ValueError: the state is of other blocks, another schedule or other param groups, or an engine holds the
                masters; nothing is changed then.
        """
        load_state(self, state_dict)
        self.state = self.base_optimizer.state

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
        self._activate(keep=self.kept)
        self._log_active()
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group["params"]:
            raise ValueError(NO_NEWCOMERS)
        super().add_param_group(param_group)

    def require_no_newcomers(self) -> None:
        """Refuse parameters that were given to the base optimizer itself, which no block has.

        Raises:
            ValueError: there are some.
        """
        held = {id(tensor) for tensor in self.active_set.masters.values()}
        if any(id(tensor) not in held for group in self.param_groups for tensor in group["params"]):
            raise ValueError(NO_NEWCOMERS)

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
        require_same_groups(self.base_optimizer, base_optimizer, self.active_set.has_stepped(self.base_optimizer))
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
        require_same_shapes(self._names, named)
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

    def _base_step(self) -> None:
        self.active_set.contract.require_exchangeable("base_optimizer")
        self._reach.look(self, by_stage=bool(self.stages))
        with scaled_rates(self.param_groups, warm_up(self.num_steps, self.schedule.period, self.warm_up_steps)):
            self.base_optimizer.step()
        self._count(self.num_steps + 1)

    def _activate(self, keep: Set[Parameter]) -> None:
        """Freeze and unfreeze, and hand the active masters to the base optimizer; old ones are freed first."""
        names, corrected = set(self.active_names()), set(self.corrected_names())
        active = {param for name, param in self.named_parameters.items() if name in names}
        for name, param in self.named_parameters.items():
            set_active(param, name in names or name in corrected)
        num_sets = math.prod(max(stop - start, 1) for start, stop in self.schedule.ranges)
        self._graphs.renew(self.named_parameters.values(), num_sets)
        self._hand_over([[param for param in members if param in active] for members in self.members], keep)
        if not self.attached:
            self._local.bind(self.base_optimizer, self.active_set, self.keys())
        following = [param for name, param in self.named_parameters.items() if name in corrected]
        if self._replicas is not None:
            self._replicas.activate([param for param in self.named_parameters.values() if param in active], following)
        elif self._corrections is not None:
            self._corrections.activate(following)
        if self.importance is not None:
            indices = self.schedule.active(self.num_steps)
            self.importance.begin(indices, [self.members_of(index) for index in indices])

    def replica_names(self) -> Mapping[Parameter, str]:
        """See `ReplicaClient`."""
        return self._names

    def take_averages(self, averages: Mapping[Parameter, Tensor]) -> None:
        """See `ReplicaClient`."""
        for param, grad in averages.items():
            param.grad = grad.view(param.shape)

    def _found_replicas(self, *, alone: bool) -> Averages | None:
        if any(map(is_dtensor, self.named_parameters.values())):
            return None  # steps are refused until an engine takes over
        return averages_for(self, self._data_group, self.corrector, alone=alone)

    def _average(self) -> None:
        """Before a step: average what waits, and gradients of backward passes that nobody has seen."""
        if self._replicas is None:
            self._replicas = self._found_replicas(alone=False)
            if self._replicas is None:
                return
            if self.corrector is not None:
                raise ValueError(
                    f"sgd_mode={self.corrector.mode!r}: got a process group of several processes after the optimizer "
                    "was made, when gradients had been applied on this process alone; expected it before. Call "
                    "torch.distributed.init_process_group first."
                )
            active = self.active_set.masters
            self._replicas.activate([param for param in self.named_parameters.values() if param in active])
        self._replicas.settle()

    def _weights(self, blocks: Sequence[int]) -> Tensor:
        members = [self.members_of(block) for block in blocks]
        if self.engine is not None:
            return self.engine.squared_weights(members)
        return squared_norms([[param.detach().reshape(-1) for param in params] for params in members])

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

    def _adopt(self, base_optimizer: Optimizer) -> None:
        self.active_set.contract = examine(base_optimizer)
        self.base_optimizer, self.defaults = base_optimizer, base_optimizer.defaults
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state
        remember_weights(base_optimizer, self.members)
        self._get_lr = getattr(base_optimizer, "_get_lr", None)  # transformers' AdafactorSchedule calls it

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockOptimizer:
        """A copy over the parameters of the model's copy; hooks and schedulers' traces stay behind, as torch's do.

        Raises:
            ValueError: the model is not copied in the same call, or other processes take part.
        """
        return deep_copy(self, memo, alone=not self.attached and self._replicas is None)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse `pickle` and `copy.copy`.

        Raises:
            TypeError: always.
        """
        raise TypeError(NOT_ALONE)
