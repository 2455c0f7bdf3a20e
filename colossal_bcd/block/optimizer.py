"""Block coordinate descent around any optimizer: BAdam (arXiv 2404.02827, algorithm 1) when that is Adam."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.checks import require_int
from colossal_bcd.block.guards import always_active, refuse_corrections, require_base, require_same_parameters
from colossal_bcd.block.masters import LocalMasters, Masters
from colossal_bcd.block.partition import Block, PrefixList, partition
from colossal_bcd.block.roster import read_roster, set_active
from colossal_bcd.block.schedule import Mode, Schedule
from colossal_bcd.block.snapshot import load_snapshot, take_snapshot
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh

logger = logging.getLogger(__name__)


class BlockOptimizer(Optimizer):
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
        lora_mode, sgd_mode, sgd_lr_scaling, sgd_use_sign, lr_warmup_step_afterswitch: BREAD's corrections of inactive
            blocks; not in this version, anything but the default raises.
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
        lora_mode: Literal["all", "partial", "adapter_only"] | None = None,
        sgd_mode: Literal["all", "partial", "disabled"] = "disabled",
        sgd_lr_scaling: float = 1.0,
        sgd_use_sign: bool = False,
        n_layer_per_block: int = 1,
        lr_warmup_step_afterswitch: int = 0,
        seed: int = 0,
        block_ranges: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        if isinstance(base_optimizer, BlockOptimizer):
            raise ValueError("base_optimizer: got a BlockOptimizer, expected the optimizer that it wraps. Wrap once.")
        require_base(base_optimizer)
        require_int("verbose", verbose, 0)
        refuse_corrections(lora_mode, sgd_mode, sgd_lr_scaling, sgd_use_sign, lr_warmup_step_afterswitch)
        roster = read_roster(named_parameters_list)
        self.blocks: tuple[Block, ...] = partition(
            roster.parameters,
            aliases=roster.aliases,
            trainable=roster.in_blocks,
            block_prefix_list=block_prefix_list,
            include_embedding=include_embedding,
            include_lm_head=include_lm_head,
            num_layers_per_block=n_layer_per_block,
            merge_seed=seed if switch_mode == "random" else None,
        )
        self.schedule = Schedule(
            num_blocks=len(self.blocks),
            period=switch_block_every,
            mode=switch_mode,
            seed=seed,
            start_block=start_block,
            ranges=tuple(block_ranges or ()),
        )
        self.ranges_given = block_ranges is not None
        """Whether the user chose the ranges; a pipeline then leaves them as they are."""
        self.always_active: tuple[str, ...] = always_active(active_modules, roster)
        """Canonical names of the parameters of `active_modules`, in model order."""
        trained = {name for block in self.blocks for name in block.parameters}.union(self.always_active)
        require_same_parameters(base_optimizer, roster, trained)
        # The empty group satisfies torch's constructor without a change to the base optimizer's groups.
        super().__init__([{"params": []}], base_optimizer.defaults)
        self.verbose = verbose
        self.num_steps = 0
        """Applied steps."""
        self.named_parameters: dict[str, Parameter] = {
            name: param for name, param in roster.parameters.items() if name in roster.trainable
        }
        """Canonical name -> every parameter on this rank that was left trainable, whether in a block or not."""
        self.members: list[list[Parameter]] = [list(group["params"]) for group in base_optimizer.param_groups]
        """Parameters of each param group as the base optimizer was given them, active or not."""
        self._names = tuple(self.named_parameters)
        self._tensors: dict[Parameter, Tensor] = {}
        self.masters: Masters = LocalMasters({param: name for name, param in roster.parameters.items()})
        self.attached = False
        """Whether an engine has taken over; it then feeds gradients, writes weights back and calls `switch_if_due`."""
        self._adopt(base_optimizer)
        if base_optimizer.state:
            logger.warning("the base optimizer has taken steps; its state is cleared, as at every switch")
        self._activate(keep=frozenset())
        self._log_active()
        if verbose:
            untrained = sum(name not in trained for name in self.named_parameters)
            logger.info("%d blocks; %d trainable parameters are in none and stay frozen", len(self.blocks), untrained)

    def active_blocks(self) -> tuple[Block, ...]:
        """The blocks that train now, one per range."""
        return tuple(self.blocks[index] for index in self.schedule.active(self.num_steps))

    def active_names(self) -> tuple[str, ...]:
        """Canonical names of the parameters that train now, on any rank, those of `active_modules` included."""
        names = {name for block in self.active_blocks() for name in block.parameters}.union(self.always_active)
        return tuple(name for name in self._names if name in names)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the active blocks, then the switch if one is due.

        Raises:
            ValueError: a gradient is sparse, the model was moved or converted, or a closure comes while an engine feeds
                the gradients.
        """
        if self.attached:
            if closure is not None:
                raise ValueError("closure: got one under a booster, expected None. Compute the loss before the step.")
            self.base_optimizer.step()
            self.num_steps += 1
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.masters.load_gradients()
        self.base_optimizer.step()
        self.masters.write_back()
        self.num_steps += 1
        self.switch_if_due()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.masters.zero_grad(set_to_none)

    def switch_if_due(self) -> bool:
        """Activate the next blocks if the last applied step ended a period; whether it did.

        Must be called once after every applied step.
        """
        if not self.schedule.is_switch(self.num_steps):
            return False
        self._activate(keep={param for name, param in self.named_parameters.items() if name in self.always_active})
        self._log_active()
        return True

    def attach(self, masters: Masters, *, held: Iterable[Parameter] | None = None) -> None:
        """Let an engine take over: its masters replace the local ones, and the active blocks are activated anew.

        Args:
            masters: the engine's.
            held: parameters on this rank; others are never activated here.  None: all.
        Raises:
            ValueError: steps were taken, whose state would be lost.
        """
        if self.num_steps or self.base_optimizer.state:
            raise ValueError(
                f"attach: the optimizer has taken {self.num_steps} steps, expected none. Boost before the first step."
            )
        self.masters, self.attached = masters, True
        if held is not None:
            here = set(held)
            for param in set(self.named_parameters.values()) - here:
                set_active(param, False)
            self.named_parameters = {name: param for name, param in self.named_parameters.items() if param in here}
            self.members = [[param for param in group if param in here] for group in self.members]
        self._activate(keep=frozenset())

    def replace_base(self, base_optimizer: Optimizer) -> None:
        """Go on with another base optimizer over the same param-group dicts.

        Raises:
            ValueError: the present one has state, or the groups are others.
        """
        old = self.base_optimizer
        same = len(old.param_groups) == len(base_optimizer.param_groups) and all(
            ours is theirs for ours, theirs in zip(old.param_groups, base_optimizer.param_groups, strict=True)
        )
        if old.state or not same:
            raise ValueError(
                f"replace_base: got a {type(base_optimizer).__name__} while the {type(old).__name__} has state of "
                f"{len(old.state)} parameters and {'the same' if same else 'other'} param groups; expected no state "
                "and the same group dicts. Replace it before the first step."
            )
        self._adopt(base_optimizer)

    def reschedule(self, block_ranges: Sequence[tuple[int, int]]) -> None:
        """Give the blocks other ranges.

        Raises:
            ValueError: steps were taken, or the ranges do not cover the blocks.
        """
        if self.num_steps:
            raise ValueError(f"reschedule: got it after {self.num_steps} steps, expected it before the first")
        self.schedule = dataclasses.replace(self.schedule, ranges=tuple(block_ranges))
        self._activate(keep=frozenset())
        self._log_active()

    def identity(self) -> dict[str, Any]:
        """What says which parameters train at which step: plain numbers, strings, lists."""
        return {
            **{field.name: getattr(self.schedule, field.name) for field in dataclasses.fields(self.schedule)},
            "ranges": [list(bounds) for bounds in self.schedule.ranges],
            "blocks": [[block.name, list(block.parameters)] for block in self.blocks],
            "always_active": list(self.always_active),
        }

    def fingerprint(self) -> list[int]:
        """Two 62-bit ints: of the blocks and their schedule, and of the progress in it.  Equal on ranks that agree."""
        progress = self.num_steps, self.schedule.active(self.num_steps)
        digests = (hashlib.sha256(repr(value).encode()).digest() for value in (self.identity(), progress))
        return [int.from_bytes(digest[:8], "big") >> 2 for digest in digests]

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
        self.num_steps = num_steps
        self._activate(keep=frozenset())
        self._log_active()

    def group_names(self, num_steps: int) -> list[list[str]]:
        """Names of the parameters held by each param group after `num_steps` applied steps, in order."""
        active = {name for index in self.schedule.active(num_steps) for name in self.blocks[index].parameters}
        active.update(self.always_active)
        names = {param: name for name, param in self.named_parameters.items() if name in active}
        return [[names[param] for param in members if param in names] for members in self.members]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group["params"]:
            raise ValueError(
                "add_param_group: got parameters after the blocks were made, expected none. Add them to the base "
                "optimizer before it is wrapped."
            )
        super().add_param_group(param_group)

    def load_base_state(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's own state dict, keeping the group dicts that schedulers hold."""
        base, groups, state = self.base_optimizer, self.base_optimizer.param_groups, self.base_optimizer.state
        base.load_state_dict(copy.deepcopy(state_dict))
        for group, loaded in zip(groups, base.param_groups, strict=True):
            group.update(loaded)
        state.clear()
        state.update(base.state)
        base.param_groups, base.state = groups, state

    def _adopt(self, base_optimizer: Optimizer) -> None:
        self.base_optimizer, self.defaults = base_optimizer, base_optimizer.defaults
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state
        self._get_lr = getattr(base_optimizer, "_get_lr", None)  # transformers' AdafactorSchedule calls it

    def _activate(self, keep: Set[Parameter]) -> None:
        """Freeze and unfreeze, and hand the active masters to the base optimizer; old ones are freed first."""
        names = set(self.active_names())
        active = {param for name, param in self.named_parameters.items() if name in names}
        for param in self.named_parameters.values():
            set_active(param, param in active)
        kept = {tensor for param, tensor in self._tensors.items() if param in keep}
        self._tensors = {}
        for group in self.param_groups:
            group["params"] = []
        for tensor in [tensor for tensor in self.base_optimizer.state if tensor not in kept]:
            del self.base_optimizer.state[tensor]
        if isinstance(self.base_optimizer, ShardedOptimizer):
            self.base_optimizer.unbind()
        groups = [[param for param in members if param in active] for members in self.members]
        for group, params, tensors in zip(self.param_groups, groups, self.masters.activate(groups, keep), strict=True):
            self._tensors.update(zip(params, tensors, strict=True))
            group["params"] = list(tensors)
        if self.attached:
            self.masters.bind()
        elif isinstance(self.base_optimizer, ShardedOptimizer):
            whole = {tensor: Layout.whole(tuple(tensor.shape)) for tensor in self._tensors.values()}
            places = {param: key for key, param in enumerate(param for group in self.members for param in group)}
            keys = {tensor: places[param] for param, tensor in self._tensors.items()}
            self.base_optimizer.bind(whole, Mesh(), keys)

    def _log_active(self) -> None:
        if not self.verbose:
            return
        blocks = ", ".join(f"{index} ({self.blocks[index].name})" for index in self.schedule.active(self.num_steps))
        self._report(f"step {self.num_steps}: block {blocks} of {len(self.blocks)} is active")
        if self.verbose >= 2:
            self._report(f"trainable: {', '.join(self.active_names())}")

    def _report(self, message: str) -> None:
        logger.info(message)
