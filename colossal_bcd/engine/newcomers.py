"""What a plain optimizer is to train besides what it trained when it was boosted: thawed weights, new param groups.

Each rank notices newcomers for itself, at the beginning of a backward pass.  It says so in the first bucket of that
pass, in which nothing else changes; where all data-parallel ranks have said the same, newcomers get masters, hooks and
places in the param groups, and their gradients of that pass are averaged in buckets of their own.  A rank without
newcomers neither waits for the device nor sends anything more; it learns of ranks that differ one step later.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.compiled import CompiledGraphs
from colossal_bcd.block.trained import NO_NEWCOMERS
from colossal_bcd.engine.agreement import digest, is_equal
from colossal_bcd.engine.failures import Late
from colossal_bcd.engine.reducer import GradientReducer
from colossal_bcd.optim.foreign.contract import examine

logger = logging.getLogger(__name__)


class Newcomers:
    """Watches which parameters a plain optimizer is to train, and takes over those that it does not train yet.

    What was trained once keeps its master and state when it is frozen: it has no gradient then, and is left alone.

    Args:
        engine: a `ZeroOptimizer`; under a BlockOptimizer, which says itself what trains, newcomers are refused.
    """

    def __init__(self, engine: Any) -> None:
        # Without a circle, so that an engine is freed, and its hooks with it, as soon as nobody holds it.
        self._engine = weakref.proxy(engine)
        self._differ: Tensor | None = None
        self._late = Late()
        self._said_unused = False

    @property
    def members(self) -> list[list[Parameter]]:
        """This rank's parameters of each param group as the user gave them, frozen ones included."""
        members: list[list[Parameter]] = self._engine.trained.members
        return members

    def add_group(self, param_group: dict[str, Any]) -> None:
        """`torch.optim.Optimizer.add_param_group`, with parameters of the boosted model.

        Raises:
            ValueError: a parameter is not in the boosted model, or in a group already, or blocks decide what trains.
        """
        params = param_group["params"]
        if isinstance(params, (list, tuple)) or not isinstance(params, (Tensor, set)):
            param_group["params"] = params = list(params)
        if self._engine.trained.plan.is_whole:
            self._check([params] if isinstance(params, Tensor) else list(params))
        self._engine.optim.add_param_group(param_group)
        self.look()

    def look(self) -> None:
        """Notice what is to be trained from now on; nothing is sent.

        Raises:
            ValueError: see `add_group`.
        """
        engine, groups = self._engine, self._engine.optim.param_groups
        known = engine.master_to_working_param
        foreign = [[tensor for tensor in group["params"] if id(tensor) not in known] for group in groups]
        if any(foreign) or len(groups) > len(self.members):
            self._take(foreign)
        if engine.trained.plan.is_whole:
            engine._reducer.joining = tuple(self._waiting())

    def join(self) -> None:
        """After a pass: take over what all ranks have said that they want to train."""
        reducer, engine = self._engine._reducer, self._engine
        asked, reducer.asked = reducer.asked, ()
        if reducer.votes is not None:
            differ = (reducer.votes > 0).all()
            self._differ = differ if self._differ is None else self._differ | differ
        if not asked:
            return
        if reducer.votes is not None and bool(reducer.votes[1] > 0):
            for param in asked:
                param.grad = None
            return
        self._require_same(asked)
        late = GradientReducer(asked, engine._reducer_config())
        late.finish()
        grads = dict(late.grads)
        late.detach()
        self._admit()
        reducer.cover(list(engine.masters.of), grads)

    def settle(self) -> None:
        """Take over what waits without a backward pass, as before a checkpoint; all ranks must call."""
        if not self._engine.trained.plan.is_whole:
            return
        self.look()
        waiting = self._waiting()
        self._require_same(waiting)
        if waiting:
            self._admit()
            self._engine._reducer.cover(list(self._engine.masters.of), {})

    def end_step(self) -> None:
        """Send on its way to the host whether ranks differed in this step."""
        self._late.send(self._differ)
        self._differ = None

    def raise_if_different(self) -> None:
        """Raise, on all ranks with other batches, if in the step before some had newcomers and some had none."""
        if self._late.read():
            raise ValueError(self._difference(f"in the step before, this rank had {self._described(self._waiting())}"))

    def note_unused(self) -> None:
        """Say once that weights were left as they are, because no batch of a step used them.

        Compares what trains with what has an averaged gradient; both are known on the host.
        """
        engine = self._engine
        if self._said_unused or not engine.trained.plan.is_whole:  # other plans watch their blocks themselves
            return
        unused = [param for param in engine.masters.of if param.requires_grad and param not in engine._reducer.grads]
        self._said_unused = bool(unused)
        if unused and dist.get_rank() == 0:
            logger.warning(
                "%s trained parameters had no gradient on any rank in this step, such as %s, and stay as they are "
                "until they have one. That is right where no batch used them. If the model uses gradient "
                "checkpointing, pass use_reentrant=False: the reentrant kind cuts the graph above frozen layers.",
                len(unused),
                engine.parameter_names.get(id(unused[0]), "?"),
            )

    def _waiting(self) -> list[Parameter]:
        of = self._engine.masters.of
        return [param for params in self.members for param in params if param.requires_grad and param not in of]

    def _check(self, tensors: Sequence[Any]) -> None:
        """Refuse what is not in the boosted model, or in a group already."""
        engine = self._engine
        members = {param for params in self.members for param in params}
        for tensor in tensors:
            if tensor in members:
                raise ValueError(
                    f"add_param_group: {self._name(tensor)!r} is in a param group already, expected a parameter that "
                    "is in none. One that is frozen trains in its group as soon as it requires grad."
                )
            if tensor not in engine.model_layouts and id(tensor) not in engine.parameter_names:
                raise ValueError(
                    f"add_param_group: got a parameter of shape {tuple(tensor.shape)} that is not in the boosted "
                    "model, expected one of model.parameters(). Boost the model again after modules were added to it."
                )

    def _take(self, foreign: Sequence[Sequence[Any]]) -> None:
        """Note the members of groups that were added, or added to; their masters come later."""
        engine, groups = self._engine, self._engine.optim.param_groups
        if not engine.trained.plan.is_whole:
            raise ValueError(NO_NEWCOMERS)
        self._check([tensor for tensors in foreign for tensor in tensors])
        self.members.extend([] for _ in groups[len(self.members) :])
        for index, tensors in enumerate(foreign):
            for tensor in tensors:
                engine._keys[id(tensor)] = self._new_key(tensor)
                if tensor in engine.model_layouts:  # else another pipeline stage has it
                    self.members[index].append(tensor)
                    engine.layouts[tensor] = engine.model_layouts[tensor]
        self._fill_groups()

    def _new_key(self, param: Tensor) -> int:
        """The next number, as on one process; in a pipeline, whose stages may get others, by place in the model."""
        keys, names = self._engine._keys, self._engine.parameter_names
        if self._engine.pp_pg is None:
            return max(keys.values(), default=-1) + 1
        return len(names) + list(names).index(id(param))

    def _fill_groups(self) -> None:
        """Put the masters of what trains, in the order of the members, into the param groups."""
        engine = self._engine
        of = engine.masters.of
        trained = [[param for param in params if param in of] for params in self.members]
        for group, params in zip(engine.optim.param_groups, trained, strict=True):
            group["params"] = [of[param] for param in params]
        engine._publish(trained, of)
        engine.bind()

    def _admit(self) -> None:
        """Make masters of all members that require grad; those that exist stay as they are."""
        engine = self._engine
        waiting, of = set(self._waiting()), engine.masters.of
        if engine.config.overlap_allgather:
            for param in waiting:
                engine.let_forward_wait(param)
        # A graph that was compiled before computes no gradient of them.
        CompiledGraphs().renew(waiting, num_sets=1)
        names = self._described([param for params in self.members for param in params if param in waiting])
        admitted = [param for params in self.members for param in params if param in of or param in waiting]
        engine.trained.active_set.exchange(admitted, of.keys())
        self._fill_groups()
        contract = examine(engine.optim)
        if contract.constructs_state and contract.by_parameter:  # such as Adagrad, which makes none in its step
            contract.begin(engine.optim, {engine.masters.of[param] for param in of})
        logger.info("from now on trained, too: %s", names)

    def _require_same(self, params: Sequence[Parameter]) -> None:
        names = sorted(self._name(param) for param in params)
        if not is_equal([len(names), digest(names)], self._engine._device, self._engine.config.data_groups):
            raise ValueError(self._difference(f"this rank has {self._described(params)}"))

    def _difference(self, mine: str) -> str:
        return (
            f"data-parallel ranks differ in the weights that were thawed or added: {mine}, others have something else; "
            "expected the same on all. Call requires_grad_ and add_param_group on every rank, before the same step."
        )

    def _described(self, params: Sequence[Parameter]) -> str:
        names = [self._name(param) for param in params]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more if names else "none"

    def _name(self, param: Tensor) -> str:
        return self._engine.parameter_names.get(id(param), f"a parameter of shape {tuple(param.shape)}")
