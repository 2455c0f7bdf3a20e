"""Block coordinate descent around any optimizer: BAdam (arXiv 2404.02827, algorithm 1) when that is Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.active_set import scaled_rates, warm_up
from colossal_bcd.block.checks import require_choice, require_int
from colossal_bcd.block.correction.by_optimizer import OptimizerCorrection
from colossal_bcd.block.correction.correction import CorrectionMode, CorrectionOptions
from colossal_bcd.block.correction.rules import Correction
from colossal_bcd.block.guards import (
    require_base,
    require_counts_apart,
    require_rates,
    require_same_parameters,
)
from colossal_bcd.block.heads import warn_of_heads
from colossal_bcd.block.importance import Importance, ImportanceOptions, Norm
from colossal_bcd.block.masters import LocalMasters
from colossal_bcd.block.parameters import read_parameters
from colossal_bcd.block.partition import PrefixList
from colossal_bcd.block.plan import LoraMode, make_plan
from colossal_bcd.block.residual import ResidualBits, ResidualOptions
from colossal_bcd.block.schedule import Mode
from colossal_bcd.block.state_dict import load_snapshot, take_snapshot
from colossal_bcd.block.switching import Switching
from colossal_bcd.optim.state.rounding import Rounding


class BlockOptimizer(Switching):
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
        start_block: index of the first block; None: the first by the order, 0 for "fixed".
        active_modules: prefixes of parameters that always train, adapters or not; their masters and state survive
            switches.
        include_embedding: also make a first block of the embeddings.
        include_lm_head: also make a last block of the head.
        verbose: 0 logs nothing, 1 a line per switch, 2 also the names of what trains; shown without logging set up.
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
        accumulation_steps: micro-batches per step, so that corrections wait for the last one; see `LocalGradients`.
        lr_warmup_step_afterswitch: steps in which the base optimizer's rate grows to its value after a switch.
        n_layer_per_block: layers in a default block: neighbours, or in "random" mode drawn by `seed`.
        importance: norms by which "importance" draws: of "gradient" or "weight"; see `ImportanceOptions`.
        importance_floor: share of the probability that all blocks have in equal parts.
        seed: of the orders; the same on every process.
        block_ranges: half-open ranges of blocks, each with its own order and active block; None: one over all.
        data_group: on several processes without a booster, those whose gradients are averaged: "auto" (the group of
            torch's DDP around the model, else all), a process group, or None, with which each trains on its own.
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
        importance: Norm = "gradient",
        importance_floor: float = 0.1,
        data_group: Any = "auto",
    ) -> None:
        if isinstance(base_optimizer, BlockOptimizer):
            raise ValueError("base_optimizer: got a BlockOptimizer, expected the optimizer that it wraps. Wrap once.")
        contract = require_base(base_optimizer)
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
        roster = read_parameters(named_parameters_list, lora_mode)
        self.ranges_given = block_ranges is not None
        """Whether the user chose the ranges; a pipeline then leaves them as they are."""
        options: dict[str, Any] = {} if corrector is None else {"corrections": corrector.identity()}
        if lr_warmup_step_afterswitch:
            options["warm_up_steps"] = lr_warmup_step_afterswitch
        if lora_mode is not None:
            options["lora"] = [lora_mode, adapter_state]
        if self.residual is not None:
            options["residual"] = [residual, residual_bits]
        drawing = ImportanceOptions.asked(switch_mode, importance, importance_floor)
        if drawing is not None:
            options["importance"] = [importance, importance_floor]
        plan = make_plan(
            roster,
            block_prefix_list=block_prefix_list,
            include_embedding=include_embedding,
            include_lm_head=include_lm_head,
            n_layer_per_block=n_layer_per_block,
            switch_block_every=switch_block_every,
            switch_mode=switch_mode,
            start_block=start_block,
            seed=seed,
            block_ranges=block_ranges,
            active_modules=active_modules,
            lora_mode=lora_mode,
            sgd_mode=sgd_mode,
            options=options,
        )
        trained = plan.trained()
        require_same_parameters(base_optimizer, roster, trained if corrector is None else roster.trainable)
        if lr_warmup_step_afterswitch or corrector is not None:
            require_rates(base_optimizer, "lr_warmup_step_afterswitch" if corrector is None else "sgd_mode")
        self.warm_up_steps = lr_warmup_step_afterswitch
        names = {param: name for name, param in roster.parameters.items()}
        kept = roster.adapters if lora_mode is not None and adapter_state == "keep" else frozenset[str]()
        kept = frozenset(kept.union(plan.always_active))
        groups = [[names[param] for param in group["params"]] for group in base_optimizer.param_groups]
        always = frozenset(plan.always_active).union(plan.adapters if lora_mode == "all" else ())
        require_counts_apart(contract, [[name for name in group if name in trained] for group in groups], kept, always)
        super().__init__(
            base_optimizer,
            plan,
            {name: roster.parameters[name] for name in plan.names},
            names=names,
            masters=LocalMasters(names, residual=self.residual),
            kept=kept,
            corrector=corrector,
            importance=None if drawing is None else Importance(drawing, len(plan.blocks)),
            verbose=verbose,
            data_group=data_group,
        )
        if corrector is None and block_prefix_list is None:
            warn_of_heads(roster.parameters, roster.trainable - trained)
        if verbose:
            untrained = sum(name not in trained for name in self.named_parameters)
            fate = "stay frozen" if corrector is None else f"are only corrected ({corrector.mode})"
            frozen = len(roster.parameters) - len(self.named_parameters)
            before = f"; {frozen} were frozen before and are in none" if frozen else ""
            self._report(f"{len(self.blocks)} blocks; {untrained} trainable parameters are in none and {fate}{before}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the active blocks, then the switch if one is due.

        Raises:
            ValueError: a gradient is sparse, the model was moved or converted, the base optimizer was given more
                parameters, or a closure comes while an engine feeds the gradients.
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
        self.require_no_newcomers()
        self._average()
        self.masters.load_gradients()
        if self._corrections is not None:
            self._corrections.settle()
        if self.importance is not None and self.importance.by_gradient:
            self.importance.note_local(self._tenants.tensors)
        self._base_step()
        self.masters.write_back()
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
        self.masters.zero_grad(set_to_none)
        for gradients in (self._corrections, self._replicas):
            if gradients is not None:
                gradients.clear()

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

    def _base_step(self) -> None:
        self.contract.require_exchangeable("base_optimizer")
        self._note_reach()
        with scaled_rates(self.param_groups, warm_up(self.num_steps, self.schedule.period, self.warm_up_steps)):
            self.base_optimizer.step()
        self._count(self.num_steps + 1)
