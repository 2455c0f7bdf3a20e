"""Blocks on torch's own sharded weights: FSDP2 gathers them and reduces gradients, this engine does the rest of a step.

    weights on N ranks         FSDP2                              FsdpEngine
    forward                    gathers one group after another
    backward                   gathers down to the lowest group
                               that trains, reduces its gradients
                               to rows of each rank
    optimizer.step()                                              rows -> gradients of masters; one norm; the update;
                                                                  masters -> rows; the switch freezes and thaws
Freezing a sharded parameter is all that FSDP2 needs to be told: it reduces what requires grad.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.correction.correction import LocalGradients
from colossal_bcd.block.gradient_checkpointing import prefer_non_reentrant
from colossal_bcd.block.importance import squared_norms
from colossal_bcd.block.optimizer import BlockOptimizer
from colossal_bcd.block.trained import NO_NEWCOMERS, PlainOptimizer, Trained, is_plain
from colossal_bcd.engine.agreement import SAME_CONSTRUCTION, is_equal
from colossal_bcd.engine.failures import LateCheck, limit_waiting, says_where
from colossal_bcd.engine.fitness import require_fit
from colossal_bcd.engine.norm import scale_gradients, totals_of
from colossal_bcd.fsdp.masters import RowMasters
from colossal_bcd.fsdp.torch_private import shard_groups
from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer
from colossal_bcd.names import plain_name
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import (
    describe_misaligned,
    follow_weights,
    misaligned,
    remember_weights,
    require_whole_chunks,
)
from colossal_bcd.sharding import Sum, resolve, sum_of_squares
from colossal_bcd.sharding.dtensor import MeshAxes, is_dtensor, layout_of, local_values

logger = logging.getLogger(__name__)

NO_LATE = (
    "step: got a weight that was {} after the optimizer was attached, expected none: it has no master and no state. "
    "Attach with it trainable and in the param groups, and freeze it afterwards."
)
USED_UP = (
    "a step follows another one without zero_grad() between them: a step uses gradients up, they do not accumulate "
    "over steps under FSDP2"
)
WHOLE_GRADIENTS = (
    "%s: FSDP2 reduces whole gradients, of which low-rank ones are made afterwards; state is small, traffic is not. "
    "LowLevelZeroPlugin and HybridParallelPlugin of colossal_bcd.booster reduce low-rank gradients."
)
IN_WHOLE = (
    "Use an optimizer of colossal_bcd, such as Adafactor, CAME, Lamb or GaLoreAdamW, which computes with whole "
    "matrices on any mesh."
)


class FsdpEngine:
    """The `Engine` of a model that `fully_shard` has sharded.

    Args:
        model: sharded; all of its groups are in it.
        trained: over its sharded parameters.
        max_norm: clip the global norm of the gradients of what is active; 0 does not.
    Raises:
        ValueError: a parameter is in no group of FSDP2, or its placements are no layout.
    """

    def __init__(self, model: nn.Module, trained: Trained, *, max_norm: float = 0.0) -> None:
        self.model, self.trained, self.max_norm = model, trained, max_norm
        self.optim = trained
        self.parameter_names = {id(param): name for name, param in trained.named_parameters.items()}
        self.groups = list(shard_groups(model))
        self._home = {param: group for group in self.groups for param in group.params}
        axes = MeshAxes()
        self.layouts = {param: layout_of(param, axes) for param in trained.named_parameters.values()}
        # Every rank on which a part or a copy of some parameter is; axes of replicas are in no layout.
        mesh = max((p.device_mesh for p in self.layouts if is_dtensor(p)), key=lambda each: each.size())
        dims = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
        self.axes = tuple(axes.name("data", mesh, dim) for dim in dims)
        self._process_groups = tuple(mesh.get_group(dim) for dim in dims)
        self.mesh = axes.mesh()
        self._device = self.groups[0].device
        base, divided = trained.base_optimizer, any(layout.axes for layout in self.layouts.values())
        require_whole_chunks(base, self.parameter_names, divided)
        changed, is_first = misaligned(base, self.layouts), all(self.mesh.rank(axis) == 0 for axis in self.axes)
        self._is_first, self._used_up, self._said_used_up = is_first, False, False
        if changed and is_first:
            logger.warning(describe_misaligned(base, changed, self.parameter_names))
        if isinstance(base, ReducedGradientOptimizer) and divided and is_first:
            logger.info(WHOLE_GRADIENTS, type(base).__name__)
        self._keys = trained.keys()
        self.masters = RowMasters(trained.active_set, self.layouts)
        self.late_check = LateCheck()
        self.corrections: LocalGradients | None = None
        self._norm: Tensor | None = None
        self._undo_prefetch: Callable[[], None] = lambda: None
        for group in self.groups:
            group.watch(self._keep_back)

    def release(self) -> None:
        """See `Engine`."""
        self.zero_grad()

    def adopt(self, groups: Sequence[Sequence[Parameter]]) -> None:
        """See `Engine`."""
        prefer_non_reentrant(self.model)
        self._working_param_groups = {index: list(params) for index, params in enumerate(groups)}
        self.bind()
        self._undo_prefetch()
        self._undo_prefetch = self._end_prefetch()
        for group in self.groups:
            group.renew()

    def bind(self) -> None:
        """Tell the base optimizer which parts of which parameters its tensors are."""
        base, of = self.trained.base_optimizer, self.masters.of
        follow_weights(base, of, self.layouts)
        if isinstance(base, ShardedOptimizer):
            keys = {master: self._keys[id(param)] for param, master in of.items()}
            base.bind({master: self.layouts[param] for param, master in of.items()}, self.mesh, keys)

    def drive(self, update: Callable[[], None]) -> None:
        """See `Engine`."""
        self.late_check.raise_if_bad()
        self.require_reduced()
        self._check()
        self._say_used_up()
        for group in self.groups:
            group.forget_prefetched()
        self.follow_weights()
        for param, master in self.masters.of.items():
            self.masters.load_gradient(param, master)
        if self.corrections is not None:
            self.corrections.settle()
        self._scale_gradients()
        with says_where("optimizer rule"):
            update()
        self.masters.write_back()
        self._used_up = True
        for group in self.groups:
            group.begin()
            group.reshard()
        self.trained.switch_if_due(self.agree)

    def follow_weights(self) -> None:
        """Let masters follow weights that were written from outside since the last step; `step` does so itself."""
        self.trained.active_set.follow()

    def admit_newcomers(self) -> None:
        """Blocks decide for themselves what trains: there are none."""

    def get_grad_norm(self) -> float | None:
        """Euclidean norm of the last step's gradients of what was active, before clipping; None before the first."""
        return None if self._norm is None else self._norm.item()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients of what is active; zeros in their place would count as gradients, so none are left."""
        self._used_up = False
        for param, master in self.masters.of.items():
            param.grad = master.grad = None
        for group in self.groups:
            group.begin()

    @torch.no_grad()
    def gradients(self) -> dict[Parameter, Tensor]:
        """This rank's rows of the averaged gradients between backward and step; what is written there counts.

        Raises:
            ValueError: they are not averaged yet.
        """
        self.require_reduced()
        return {param: local_values(param.grad) for param in self.masters.of if param.grad is not None}

    @torch.no_grad()
    @says_where("norm of gradients")
    def norm_of(self, grads: Mapping[Parameter, Tensor]) -> Tensor:
        """Scalar, float64: the Euclidean norm of whole gradients, in one sum for each axis.

        Args:
            grads: what `gradients` returns; all ranks must call.
        """
        squares = [sum_of_squares(grad.reshape(-1), self.layouts[param].axes) for param, grad in grads.items()]
        answers = resolve(squares, self.mesh)
        return totals_of(dict(zip(grads, answers, strict=True)), self._device)[0].sqrt()

    @says_where("switch of blocks")
    def squared_weights(self, blocks: Sequence[Sequence[Parameter]]) -> Tensor:
        """See `Engine`."""
        parts = [[self.masters.weight_of(param) for param in params if self._counts(param)] for params in blocks]
        squares = squared_norms(parts, self._device)
        return resolve([Sum(squares, self.axes)], self.mesh)[0]

    @says_where("switch of blocks")
    def agree(self) -> None:
        """Compare what trains, and from when on, over all ranks.

        Raises:
            ValueError: on every rank, if any two differ.
        """
        fingerprint = self.trained.plan.fingerprint(self.trained.num_steps)
        if not is_equal(fingerprint, self._device, self._process_groups):
            raise ValueError(
                f"block schedule: this rank is at {fingerprint} after {self.trained.num_steps} steps, others differ; "
                f"expected all ranks to agree. {SAME_CONSTRUCTION}"
            )

    def _counts(self, param: Parameter) -> bool:
        """Whether this rank's part of a parameter counts: replicas of it do not."""
        replicas = set(self.axes) - set(self.layouts[param].axes)
        return all(self.mesh.rank(axis) == 0 for axis in replicas)

    def _keep_back(self, params: Collection[Parameter]) -> None:
        if self.corrections is not None:
            self.corrections.note_pass(param for param in params if param not in self.masters.of)

    def _end_prefetch(self) -> Callable[[], None]:
        """Gather nothing below the lowest group that trains, where backward ends.

        Groups run in the order of their first parameters, but for the root's, whose backward pass is the first.
        """
        order = {param: index for index, param in enumerate(self.model.parameters()) if param in self._home}
        trained = [param for param in order if param.requires_grad]
        others = [param for param in order if self._home[param].module is not self.model]
        if not trained or not others or order[trained[0]] <= order[others[0]]:
            return lambda: None
        return self._home[trained[0]].end_prefetch()

    def _say_used_up(self) -> None:
        """Say once that gradients of the last step are not added to."""
        if self._used_up and not self._said_used_up:
            self._said_used_up = True
            if self._is_first:
                logger.info(USED_UP)

    def require_reduced(self) -> None:
        """Refuse to read gradients that FSDP2 has kept back."""
        for group in self.groups:
            if group.late:
                name = self.parameter_names.get(id(group.params[0]), "?")
                raise ValueError(
                    f"step: the last backward pass has not reduced the gradients of {name!r} and what is gathered with "
                    "it, expected that of the last micro-batch to. Call model.set_requires_gradient_sync(True) and "
                    "model.set_requires_all_reduce(True) before it."
                )

    def _check(self) -> None:
        """Refuse a step on what FSDP2 no longer gathers, or that this engine does not know."""
        trained, of = self.trained, self.masters.of
        masters = {id(master) for master in of.values()}
        given = [tensor for group in trained.base_optimizer.param_groups for tensor in group["params"]]
        if any(id(tensor) not in masters for tensor in given):
            raise ValueError(NO_NEWCOMERS if not trained.plan.is_whole else NO_LATE.format("added"))
        if trained.plan.is_whole and any(p.requires_grad and p not in of for group in trained.members for p in group):
            raise ValueError(NO_LATE.format("thawed"))
        for param, master in of.items():
            name = self.parameter_names[id(param)]
            if not self._home[param].stores(param):
                raise ValueError(
                    f"parameter {name!r} is no longer what FSDP2 gathers: it, or its memory, was replaced after the "
                    "optimizer was attached, as by load_state_dict(assign=True). Load weights in place, or make the "
                    "optimizer afterwards."
                )
            if param.device != master.device or self.masters.dtype(param) != master.dtype:
                raise ValueError(
                    f"parameter {name!r} is now {param.dtype} on {param.device}, its master is {master.dtype} on "
                    f"{master.device}: the model was moved or converted after the optimizer was attached. Make the "
                    "optimizer after model.to(...)."
                )

    @says_where("norm of gradients")
    def _scale_gradients(self) -> None:
        """Clip by the global norm of what is active; what no rank has a gradient of has none, as on one process.

        All in one packed sum for each axis: norms, and whether any rank has a gradient.  Only a rank that has not needs
        to wait for the answer.
        """
        of, importance = self.masters.of, self.trained.importance
        here = [master.grad is not None and param not in self._home[param].absent for param, master in of.items()]
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in of.values()]
        squares = [
            sum_of_squares(grad.reshape(-1), self.layouts[param].axes) for param, grad in zip(of, grads, strict=True)
        ]
        flags = torch.tensor(here, dtype=torch.float64).to(grads[0].device, non_blocking=True)
        *answers, reached = resolve([*squares, Sum(flags, self.axes)], self.mesh)
        for index, master in enumerate(of.values()):
            master.grad = grads[index] if here[index] or bool(reached[index] > 0) else None
        totals = totals_of(dict(zip(of, answers, strict=True)), grads[0].device, importance)
        self._norm = scale_gradients(grads, totals, self.max_norm, importance=importance)
        self.late_check.note(self._norm)


def attach(model: nn.Module, optimizer: BlockOptimizer, *, max_norm: float = 0.0) -> FsdpEngine:
    """Let a block optimizer train a model that `fully_shard` has sharded; `optimizer.step()` does all from then on.

    One that was made before the model was sharded is pointed to the sharded parameters of the same names.

    Args:
        model: the outermost module that was sharded.
        optimizer: made from its parameters; any base optimizer whose updates are element-wise, or of this package.
        max_norm: clip the global norm of the gradients of what is active; 0 does not.
    Returns:
        The engine; `get_grad_norm()` is what users ask of it.
    Raises:
        TypeError: the optimizer is none with blocks; others need no engine.
        ValueError: a parameter that trains is not sharded, steps were taken, an argument is wrong, or ranks differ.
    """
    if is_plain(optimizer):
        raise TypeError(
            f"attach: got a {type(optimizer).__name__}, expected a BlockOptimizer. Optimizers without blocks step on "
            "sharded parameters as they are; make them after fully_shard."
        )
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not 0 <= max_norm < float("inf"):
        raise ValueError(f"attach: got max_norm={max_norm!r}, expected a number of at least 0, which does not clip")
    if optimizer.engine is not None:
        raise ValueError("attach: the optimizer has an engine already, expected one without. Attach it once.")
    groups = list(shard_groups(model))
    for group in groups:
        group.reshard()  # after an evaluation the weights of the outermost group are whole
    sharded = {param for group in groups for param in group.params}
    wanted = optimizer.named_parameters if optimizer.corrector is not None else optimizer.plan.trained()
    if any(optimizer.named_parameters[name] not in sharded for name in wanted):
        named = {plain_name(name): param for name, param in model.named_parameters()}
        outside = [name for name in wanted if named.get(name) not in sharded]
        if outside:
            raise ValueError(
                f"attach: {len(outside)} parameters that are to be trained, such as {outside[0]!r}, are in no group of "
                "fully_shard, which would average their gradients; expected all to be. Call "
                "colossal_bcd.fsdp.shard(model), or fully_shard on the outermost module."
            )
        optimizer.point_to(named)
    corrector = optimizer.corrector
    if corrector is not None and any(group.copies_late for group in groups):
        raise ValueError(
            f"sgd_mode={corrector.mode!r}: got CPUOffloadPolicy(pin_memory=True) with torch "
            f"{torch.__version__}, which corrects by gradients before they have arrived; expected pin_memory=False, or "
            "torch 2.13 or later."
        )
    divided = any(param.device_mesh.size() > 1 for param in sharded if is_dtensor(param))
    require_fit(optimizer, "parts" if divided else "wholes", "attach", IN_WHOLE)
    with limit_waiting():
        engine = FsdpEngine(model, optimizer, max_norm=float(max_norm))
    engine.agree()
    if corrector is not None:
        corrector.bind(engine.layouts, engine.mesh)
        names = {param: name for name, param in optimizer.named_parameters.items()}
        engine.corrections = LocalGradients(corrector, names)
    optimizer.attach(engine, corrections=engine.corrections)
    return engine


def attach_plain(
    model: nn.Module, optimizer: Optimizer, names: Mapping[int, str], *, max_norm: float = 0.0
) -> FsdpEngine:
    """Let an optimizer without blocks train float32 masters of a model's rows: a plan of one block, never switched.

    Args:
        model: the outermost module that was sharded.
        optimizer: made from its parameters; without state.
        names: of the parameters, by id.
        max_norm: clip the global norm of the gradients; 0 does not.
    Returns:
        The engine, which steps by `drive(optimizer.step)`.
    """
    trained = PlainOptimizer(optimizer, names)
    remember_weights(optimizer, trained.members)
    with limit_waiting():
        engine = FsdpEngine(model, trained, max_norm=max_norm)
    trained.attach(engine)
    return engine
