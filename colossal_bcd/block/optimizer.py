"""Block coordinate descent around any optimizer: BAdam (arXiv 2404.02827, algorithm 1) when that is Adam."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Literal

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.checks import require_choice, require_int
from colossal_bcd.block.correction import (
    CorrectionMode,
    CorrectionOptions,
    Corrections,
    LocalCorrections,
)
from colossal_bcd.block.guards import (
    always_active,
    require_base,
    require_rates,
    require_same_parameters,
)
from colossal_bcd.block.masters import LocalMasters, Masters
from colossal_bcd.block.optimizer_correction import OptimizerCorrection
from colossal_bcd.block.partition import PrefixList, partition
from colossal_bcd.block.plan import LoraMode, Plan
from colossal_bcd.block.residual import ResidualBits, ResidualOptions
from colossal_bcd.block.roster import read_roster, set_active
from colossal_bcd.block.rules import Correction
from colossal_bcd.block.schedule import Mode, Schedule
from colossal_bcd.block.snapshot import load_snapshot, take_snapshot
from colossal_bcd.block.tenants import scaled_rates, warm_up
from colossal_bcd.block.wrapper import Wrapper
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.rounding import Rounding

logger = logging.getLogger(__name__)


class BlockOptimizer(Wrapper):
    """Trains one block of a model at a time with the base optimizer and freezes the rest.

    After exactly `switch_block_every` applied steps the next block becomes active: the base optimizer's state is
    cleared (also where the next block is the same one) and, for bfloat16 and float16 weights, float32 masters are
    cloned from the new block's weights.  A step skipped by a loss scaler counts for nothing.  Gradients are consumed by
    the step.

    `param_groups` is the base optimizer's list with the same dicts for ever, so schedulers of either optimizer, made
    before or after, act on both; learning rate and weight decay are per group, as given to the base optimizer.  Only
    `group["params"]` changes: it holds the active masters.

    What was frozen before stays frozen and is in no block; what is in no block is frozen.  In a model with LoRA
    adapters blocks train the adapters only.  A head tied to the embedding is in one block: the embedding's with
    `include_embedding`, else the head's with `include_lm_head`; it is never trained unasked.

    Args:
        base_optimizer: optimizer over the model's parameters; any but LBFGS.
        named_parameters_list: pairs as of `model.named_parameters()`; two names for one tensor are a tie.
        block_prefix_list: the blocks, each a list of prefixes of parameter names (or one prefix); a prefix is whole
            components from the start of a name.  None: one block per layer.
        switch_block_every: applied steps per block, K in the paper.
        switch_mode: "random" (a new permutation every epoch of blocks), "ascending", "descending", "fixed" (one block).
        start_block: index of the first block; None: the first by the order, 0 for "fixed".
        active_modules: prefixes of parameters that always train, adapters or not; their masters and state survive
            switches.
        include_embedding: also make a first block of the embeddings.
        include_lm_head: also make a last block of the head.
        verbose: 0 logs nothing, 1 a line per switch, 2 also the names of what trains.
        lora_mode: BREAD's adapters, in a model of peft: blocks train the weights below, which peft has frozen, and
            besides train "all" adapters, or, "partial", those from the active layer on; "adapter_only": blocks are the
            adapters alone. None: the same, as BAdam does.
        adapter_state: with a `lora_mode` adapters keep masters and state while they do not train, or start anew.
        residual: "keep" what rounding cuts off a master at a switch, of bfloat16 and float16 weights that have trained.
        residual_bits: 16 or 8 per value; see `ResidualOptions`.
        residual_offload: keep residuals on the CPU.
        sgd_mode: BREAD's correction of what is not active, within backward: "all" of it, embedding, head and norms
            included; "partial" what comes after the first active parameter; "disabled". Clipping leaves it alone.
        sgd_lr_scaling: its learning rate, as a multiple of that of the parameter's group.
        sgd_use_sign: correct by the gradient's sign.
        correction: another rule; None: the gradient, or its sign.
        correction_rounding: of corrected bfloat16 and float16 weights; "nearest" loses updates below half their step.
        accumulation_steps: micro-batches per step, so that corrections wait for the last one; see `LocalCorrections`.
        lr_warmup_step_afterswitch: steps in which the base optimizer's rate grows to its value after a switch.
        n_layer_per_block: layers in a default block: neighbours, or in "random" mode drawn by `seed`.
        seed: of the orders; the same on every process.
        block_ranges: half-open ranges of blocks, each with its own order and active block; None: one over all.
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
        start_block: int | None = None,
        active_modules: Sequence[str] = (),
        include_embedding: bool = False,
        include_lm_head: bool = False,
        verbose: int = 1,
        lora_mode: LoraMode | None = None,
        sgd_mode: CorrectionMode = "disabled",
        sgd_lr_scaling: float = 1.0,
        sgd_use_sign: bool = False,
        n_layer_per_block: int = 1,
        lr_warmup_step_afterswitch: int = 0,
        seed: int = 0,
        block_ranges: Sequence[tuple[int, int]] | None = None,
        correction: Correction | OptimizerCorrection | None = None,
        correction_rounding: Rounding = "nearest",
        accumulation_steps: int = 1,
        adapter_state: Literal["keep", "reset"] = "keep",
        residual: Literal["drop", "keep"] = "drop",
        residual_bits: ResidualBits = 16,
        residual_offload: bool = False,
    ) -> None:
        if isinstance(base_optimizer, BlockOptimizer):
            raise ValueError("base_optimizer: got a BlockOptimizer, expected the optimizer that it wraps. Wrap once.")
        require_base(base_optimizer)
        require_int("verbose", verbose, 0)
        require_int("lr_warmup_step_afterswitch", lr_warmup_step_afterswitch, 0)
        require_choice("lora_mode", lora_mode, (None, "all", "partial", "adapter_only"))
        require_choice("adapter_state", adapter_state, ("keep", "reset"))
        self.residual = ResidualOptions.asked(residual, residual_bits, residual_offload)
        corrector = CorrectionOptions(
            sgd_mode=sgd_mode,
            sgd_lr_scaling=sgd_lr_scaling,
            sgd_use_sign=sgd_use_sign,
            correction=correction,
            correction_rounding=correction_rounding,
            accumulation_steps=accumulation_steps,
            seed=seed,
        ).corrector()
        roster = read_roster(named_parameters_list, lora_mode)
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
        self.ranges_given = block_ranges is not None
        """Whether the user chose the ranges; a pipeline then leaves them as they are."""
        options: dict[str, Any] = {} if corrector is None else {"corrections": corrector.identity()}
        if lr_warmup_step_afterswitch:
            options["warm_up_steps"] = lr_warmup_step_afterswitch
        if lora_mode is not None:
            options["lora"] = [lora_mode, adapter_state]
        if self.residual is not None:
            options["residual"] = [residual, residual_bits]
        plan = Plan(
            names=tuple(name for name in roster.parameters if name in roster.trainable),
            blocks=blocks,
            schedule=schedule,
            always_active=always_active(active_modules, roster),
            adapters=roster.adapters,
            lora_mode=lora_mode,
            sgd_mode=sgd_mode,
            options=options,
        )
        trained = plan.trained()
        require_same_parameters(base_optimizer, roster, trained if corrector is None else roster.trainable)
        if lr_warmup_step_afterswitch or corrector is not None:
            require_rates(base_optimizer, "lr_warmup_step_afterswitch" if corrector is None else "sgd_mode")
        super().__init__(base_optimizer, plan, {name: roster.parameters[name] for name in plan.names})
        self.verbose = verbose
        names = {param: name for name, param in roster.parameters.items()}
        kept = roster.adapters if lora_mode is not None and adapter_state == "keep" else frozenset[str]()
        self._kept = {self.named_parameters[name] for name in kept.union(plan.always_active)}
        self.masters: Masters = LocalMasters(names, residual=self.residual)
        self.warm_up_steps = lr_warmup_step_afterswitch
        self.corrector = corrector
        """Updates what is not active; None: nothing does."""
        self._corrections: Corrections | None = None
        if corrector is not None:
            corrector.adopt(self.named_parameters, list(zip(base_optimizer.param_groups, self.members, strict=True)))
            self._corrections = LocalCorrections(corrector, names)
        self.attached = False
        """Whether an engine has taken over; it then feeds gradients, writes weights back and calls `switch_if_due`."""
        if base_optimizer.state:
            logger.warning("the base optimizer has taken steps; its state is cleared, as at every switch")
        self._activate(keep=frozenset())
        self._log_active()
        if verbose:
            untrained = sum(name not in trained for name in self.named_parameters)
            fate = "stay frozen" if corrector is None else f"are only corrected ({corrector.mode})"
            logger.info("%d blocks; %d trainable parameters are in none and %s", len(self.blocks), untrained, fate)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the active blocks, then the switch if one is due.

        Raises:
            ValueError: a gradient is sparse, the model was moved or converted, or a closure comes while an engine feeds
                the gradients.
        """
        if self.attached:
            if closure is not None:
                raise ValueError("closure: got one under a booster, expected None. Compute the loss before the step.")
            self._base_step()
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.masters.load_gradients()
        if self._corrections is not None:
            self._corrections.settle()
        self._base_step()
        self.masters.write_back()
        self.switch_if_due()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.masters.zero_grad(set_to_none)
        if self._corrections is not None:
            self._corrections.clear()

    def switch_if_due(self) -> bool:
        """Activate the next blocks if the last applied step ended a period; whether it did.

        Must be called once after every applied step.
        """
        if not self.schedule.is_switch(self.num_steps):
            return False
        self._activate(keep=self._kept)
        self._log_active()
        return True

    def attach(
        self, masters: Masters, *, held: Iterable[Parameter] | None = None, corrections: Corrections | None = None
    ) -> None:
        """Let an engine take over: its masters replace the local ones, and the active blocks are activated anew.

        Args:
            masters: the engine's.
            corrections: the engine's; needed where there is a `corrector`.
            held: parameters on this rank; others are never activated here.  None: all.
        Raises:
            ValueError: steps were taken, whose state would be lost, or there is nobody for the corrections.
        """
        if self.num_steps or self.base_optimizer.state:
            raise ValueError(
                f"attach: the optimizer has taken {self.num_steps} steps, expected none. Boost before the first step."
            )
        if self._corrections is not None:
            if corrections is None:
                raise ValueError("attach: got an engine without corrections, expected some, as sgd_mode asks for them")
            self._corrections.activate([])
            self._corrections = corrections
        self.masters, self.attached = masters, True
        if held is not None:
            here = set(held)
            for param in set(self.named_parameters.values()) - here:
                set_active(param, False)
            self.named_parameters = {name: param for name, param in self.named_parameters.items() if param in here}
            self.members = [[param for param in group if param in here] for group in self.members]
        self._activate(keep=frozenset())

    def reschedule(self, block_ranges: Sequence[tuple[int, int]]) -> None:
        """Give the blocks other ranges.

        Raises:
            ValueError: steps were taken, or the ranges do not cover the blocks.
        """
        if self.num_steps:
            raise ValueError(f"reschedule: got it after {self.num_steps} steps, expected it before the first")
        schedule = dataclasses.replace(self.schedule, ranges=tuple(block_ranges))
        self.plan = dataclasses.replace(self.plan, schedule=schedule)
        self._activate(keep=frozenset())
        self._log_active()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, and under "block" what resumes in the middle of a block.

        Tensors are not copied.  `torch.load(weights_only=True)` can read it.

        Raises:
            ValueError: an engine holds the masters.
        """
        return take_snapshot(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where the state was taken; the model's weights are loaded apart, before or after.

        Raises:
            ValueError: the state is of other blocks, another schedule or other param groups, or an engine holds the
                masters; nothing is changed then.
        """
        load_snapshot(self, state_dict)

    def resume_at(self, num_steps: int) -> None:
        """Activate what trains after `num_steps` applied steps, with fresh masters and without state."""
        require_int("num_steps", num_steps, 0)
        self._count(num_steps)
        self._activate(keep=frozenset())
        self._log_active()

    def _activate(self, keep: Set[Parameter]) -> None:
        """Freeze and unfreeze, and hand the active masters to the base optimizer; old ones are freed first."""
        names, corrected = set(self.active_names()), set(self.corrected_names())
        active = {param for name, param in self.named_parameters.items() if name in names}
        for name, param in self.named_parameters.items():
            set_active(param, name in names or name in corrected)
        groups = [[param for param in members if param in active] for members in self.members]
        self._tenants.replace(self.base_optimizer, self.masters, groups, keep)
        if self.attached:
            self.masters.bind()
        elif isinstance(self.base_optimizer, ShardedOptimizer):
            self._tenants.bind_whole(self.base_optimizer, self.members)
        if self._corrections is not None:
            self._corrections.activate([param for name, param in self.named_parameters.items() if name in corrected])

    def _base_step(self) -> None:
        with scaled_rates(self.param_groups, warm_up(self.num_steps, self.schedule.period, self.warm_up_steps)):
            self.base_optimizer.step()
        self._count(self.num_steps + 1)

    def _count(self, num_steps: int) -> None:
        self.num_steps = num_steps
        if self.corrector is not None:
            self.corrector.num_steps = num_steps

    def _log_active(self) -> None:
        if not self.verbose:
            return
        blocks = ", ".join(f"{index} ({self.blocks[index].name})" for index in self.schedule.active(self.num_steps))
        self._report(f"step {self.num_steps}: block {blocks} of {len(self.blocks)} is active")
        if self.verbose >= 2:
            self._report(f"trainable: {', '.join(self.active_names())}")

    def _report(self, message: str) -> None:
        logger.info(message)
