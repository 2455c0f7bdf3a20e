"""The optimizer wrapper behind the plugins: gradient averages, master weights and steps of what is trained.

It subclasses ColossalAI's ZeRO optimizer because ColossalAI's schedules and checkpoint io ask for that class; of what
trains, everything is here.  Stage 0 is the same code with masters that are not sharded.  W: ranks that share masters.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelZeroOptimizer
from colossalai.interface import OptimizerWrapper
from colossalai.shardformer.layer.utils import SeqParallelUtils
from colossalai.tensor.colo_parameter import ColoParameter
from colossalai.zero.low_level.zero_hook import set_all_gather_handle, wait_all_gather_handle
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.checks import refuse_torch_checkpoint
from colossal_bcd.block.correction.correction import CorrectionState
from colossal_bcd.block.trained import trained_of
from colossal_bcd.booster.adapters import EngineAdapters
from colossal_bcd.booster.boosting import Uncopied
from colossal_bcd.booster.gradients import LossScaler, SequenceSums
from colossal_bcd.booster.stock_surface import StockSurface, mend_state
from colossal_bcd.checkpoint.load import Loading
from colossal_bcd.checkpoint.opened import opened_state
from colossal_bcd.checkpoint.save import Pinned, whole_state
from colossal_bcd.checkpoint.trained import EngineState
from colossal_bcd.engine.agreement import require_agreement
from colossal_bcd.engine.config import EngineConfig, ReducerConfig, mesh_of
from colossal_bcd.engine.failures import LateCheck, says_where
from colossal_bcd.engine.masters import ShardedMasters, require_quantized_shares
from colossal_bcd.engine.newcomers import Newcomers
from colossal_bcd.engine.norm import scale_gradients, squared_weights, totals_of
from colossal_bcd.engine.reducer import GradientReducer
from colossal_bcd.engine.sinks import Apply, ApplyConfig
from colossal_bcd.engine.transport import prefers_whole_rows, transport_of
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.optim.foreign.bitsandbytes_states import follow_weights, slice_chunk
from colossal_bcd.optim.options import require_real
from colossal_bcd.sharding import Layout, Sum, resolve

logger = logging.getLogger(__name__)


class ZeroOptimizer(Uncopied, StockSurface, HybridParallelZeroOptimizer, Optimizer):
    """Optimizer wrapper for what the optimizer trains now: all parameters, or the active block of a `BlockOptimizer`.

    A step from top to bottom; what is on the left belongs to the engine, and all of it exists for what trains now only:

        backward(loss)         Newcomers.look         were weights thawed or added since the last pass?
                               transport.expect       which gradients travel in low rank this time
          hooks of weights     GradientReducer        packs `param.grad` into buckets, frees it, starts collectives
                               Apply                  (sink) corrects inactive weights as soon as their bucket is there
          end of the pass      GradientReducer.finish waits; `reducer.grads` has averages, `param.grad` shows them
        step()                 settle                 averages what `no_sync` has left;  loss scaling may skip the step
                               SequenceSums.add_up    what sequence parallelism has left partial
                               transport.load         averages -> `master.grad`, this rank's share of each
                               scale_gradients        one norm over all axes: loss scale, clipping, importance
                               optim.step             the user's optimizer on masters: rule, and rounds where it asks
                               transport.drop         frees `master.grad`
                               masters.write_back     masters -> weights, gathered from the ranks that share them
                               switch_if_due          next block: the active set makes masters, `adopt` hooks

    It is also a `torch.optim.Optimizer` by type, so that schedulers can be made on it, and the `Engine` of what
    is trained: a plain optimizer is a plan of one block.

    Args:
        optimizer: the user's, already cast.
        model: ColossalAI's model wrapper.
        layouts: tensor-parallel layout of every parameter on this rank, whether the optimizer has it or not.
        config: see `EngineConfig`.
        parameter_names: names in the model before it was sharded, by id; for checkpoints.
        tied_elsewhere: parameters whose gradient another pipeline stage counts.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: Any,
        layouts: Mapping[Parameter, Layout],
        config: EngineConfig,
        *,
        parameter_names: Mapping[int, str],
        tied_elsewhere: Set[Parameter] = frozenset(),
    ) -> None:
        require_real("boost", [(parameter_names.get(id(param), "without a name"), param) for param in layouts])
        OptimizerWrapper.__init__(self, optimizer)
        self.config, self.model = config, model
        self.parameter_names = parameter_names
        self.tp_pg, self.pp_pg = config.tp_group, config.pp_group
        self.stage_manager = getattr(model, "stage_manager", None)
        self.shared_params = getattr(model, "shared_params", [])
        self.require_grad_sync = True
        self.trained = trained_of(optimizer, parameter_names)
        self._keys = self.trained.keys()
        self.model_layouts, self._tied_elsewhere = layouts, tied_elsewhere
        self.layouts = {param: layout for param, layout in layouts.items() if id(param) in self._keys}
        self._backward_context = getattr(model, "_hook_context", contextlib.nullcontext)
        self._partition_grads = config.partition_grad
        self._current_grad_norm: Tensor | None = None
        self._consumed = self._said_consumed = False
        self.late_check = LateCheck()
        self.masters = ShardedMasters(
            self.trained.active_set,
            layouts,
            config.zero_groups,
            low_precision=not config.master_weights,
            offload=config.cpu_offload,
            whole_rows=prefers_whole_rows(self._base),
            chunk=slice_chunk(self._base),
        )
        self._mesh = mesh_of(config, self._device)
        self._sequence = SequenceSums(model, self.tp_pg)
        is_partial, plain = SeqParallelUtils.is_sp_partial_derived_param, self.trained.plan.is_whole
        self._transport = transport_of(self._base, config, self.shared_params, is_partial, plain=plain)
        self._reducer = GradientReducer([], self._reducer_config())
        self.mixed_precision_mixin = None
        if config.fp16 is not None:
            engine = weakref.ref(self)  # else only the garbage collector could free the optimizer
            self.mixed_precision_mixin = LossScaler(
                lambda: [] if (alive := engine()) is None else alive._reducer.checked, **config.fp16
            )
        groups = config.zero_groups
        self.param_to_pg = dict.fromkeys(layouts, groups[0] if len(groups) == 1 else groups or None)
        self._newcomers = Newcomers(self)
        require_quantized_shares(self._base, self.masters, self.layouts, parameter_names)
        if not self.trained.plan.is_whole:
            self._agree()
        corrector = self.trained.corrector
        source = None if corrector is None else EngineGradients(self, corrector)
        self.trained.attach(self, held=set(self.layouts), corrections=source)

    def release(self) -> None:
        """See `Engine`."""
        self._force_wait_all_gather()
        self.zero_grad()
        self._reducer.detach()
        self._publish([], {})

    def adopt(self, groups: Sequence[Sequence[Parameter]]) -> None:
        """See `Engine`."""
        self._reducer = GradientReducer(list(self.masters.of), self._reducer_config())
        self._publish(groups, self.masters.of)
        self.bind()

    def drive(self, update: Callable[[], None]) -> None:
        """See `Engine`: `step` has moved the gradients."""
        update()

    def load_gradients(self) -> None:
        """Move the averaged gradients to the masters."""
        self._reducer.take_back()
        self._transport.load(self._reducer, self.masters, self._mesh)

    @says_where("gather of weights")
    def write_back(self) -> None:
        """Write the masters into the working parameters of every rank."""
        size = self.config.reduce_bucket_size
        done = self._transport.replicate(self.masters, size)
        defer = set_all_gather_handle if self.config.overlap_allgather else None
        self.masters.write_back(size, defer=defer, done=done)

    @says_where("switch of blocks")
    def squared_weights(self, blocks: Sequence[Sequence[Parameter]]) -> Tensor:
        """See `Engine`."""
        self._force_wait_all_gather()
        return squared_weights(blocks, self.masters, self._mesh, self._device, self._tied_elsewhere)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients of what is active; zeros in their place would count as gradients, so none are left."""
        self._consumed = False
        for param, master in self.masters.of.items():
            param.grad = master.grad = None
        self._reducer.clear()

    def backward(self, loss: Tensor, inputs: Any = None, retain_graph: bool = False, **kwargs: Any) -> None:
        self._before_backward()
        if self.mixed_precision_mixin is not None:
            loss = self.mixed_precision_mixin.pre_backward(loss)
        if loss.requires_grad:  # else this rank's batch uses nothing that trains now: it takes part with zeros
            with self._backward_context(), says_where("backward"):
                loss.backward(inputs=inputs, retain_graph=retain_graph, **kwargs)
        self._after_backward()

    def backward_by_grad(self, tensor: Any, grad: Any, inputs: Any = None, retain_graph: bool = False) -> None:
        self._before_backward()
        if self.mixed_precision_mixin is not None:
            grad = self.mixed_precision_mixin.pre_backward_by_grad(tensor, grad)
        with says_where("backward"):
            torch.autograd.backward(tensor, grad, inputs=inputs, retain_graph=retain_graph)
        self._after_backward()

    def sync_dp_grads(self) -> None:
        """Average what backward passes under `no_sync` have left; called by ColossalAI after a pipeline's passes."""
        self._transport.expect(self._reducer, self.masters.of)
        self._reducer.finish()
        self._newcomers.join()
        self.show_gradients()

    def settle(self) -> None:
        """Average what waits; from here to the step `param.grad` is not read any more."""
        self._reducer.take_back()
        self._newcomers.look()
        self._transport.expect(self._reducer, self.masters.of)
        self._reducer.settle()
        self._newcomers.join()

    def show_gradients(self) -> None:
        """Let `param.grad` be the average where every rank has the whole of it; what is changed there counts.

        Under a loss scale it is not shown either: torch's functions would clip the scaled norm.
        """
        alone = self.tp_pg is None and self.pp_pg is None and self.mixed_precision_mixin is None
        self._reducer.show(alone=alone)

    @contextlib.contextmanager
    def no_sync(self) -> Any:
        """Accumulate local gradients without communication."""
        before, self.require_grad_sync = self.require_grad_sync, False
        try:
            yield
        finally:
            self.require_grad_sync = before

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One optimizer step on the averaged gradients; at the end of a block's period, switch to the next block.

        A step that loss scaling skips on overflow is no step: it counts for nothing.
        """
        if closure is not None:
            raise ValueError("step(closure): a sharded step cannot run the closure; call backward, then step()")
        if not self.require_grad_sync:
            return
        self.late_check.raise_if_bad()
        self._newcomers.raise_if_different()
        scaler = self.mixed_precision_mixin
        with says_where("average of gradients"):
            self.settle()
            self._newcomers.note_unused()
            if scaler is not None and scaler.should_skip_step():
                self._say_overflow()
                self.zero_grad()
                return
        self.follow_weights()
        self._sequence.add_up(self.masters.of, self._reducer.grads)
        self.load_gradients()
        self._scale_gradients(1.0 if scaler is None else scaler.get_grad_div_scale())
        with says_where("optimizer rule"):
            self.optim.step()
        self._drop_gradients()
        self.write_back()
        self._newcomers.end_step()
        self.trained.switch_if_due(self._agree)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters of the boosted model, on every rank alike; see `Newcomers.add_group`."""
        self._newcomers.add_group(param_group)

    def admit_newcomers(self) -> None:
        """Train what was thawed or added from now on, before a backward pass finds it.  All ranks must call."""
        self._newcomers.settle()

    def get_grad_norm(self, norm_type: float = 2, **kwargs: Any) -> float | None:
        """Euclidean norm of the last step's whole or low-rank gradients, before clipping, without the loss scale."""
        if norm_type != 2:
            raise ValueError(f"get_grad_norm: got norm_type={norm_type}, expected 2, the norm that clipping uses")
        return None if self._current_grad_norm is None else self._current_grad_norm.item()

    def update_master_params(self, model: Any) -> None:
        """Take the masters from the working parameters again, after weights were loaded."""
        self._force_wait_all_gather()
        self.masters.active_set.follow(self.masters.of)

    def wait_for_weights(self) -> None:
        """With `overlap_allgather`: wait until every weight holds what the last step made of it.

        A forward pass waits by itself.  Call this before weights are read or written outside of one.
        """
        self._force_wait_all_gather()

    def follow_weights(self) -> None:
        """Let masters follow weights that were written from outside since the last step; `step` does so itself."""
        self._force_wait_all_gather()
        self.masters.active_set.follow()

    def state_dict(self, pinned_state_dicts: Pinned | None = None, only_on_master: bool = False) -> dict[str, Any]:
        """All state, gathered: what `booster.save_optimizer` writes into a file.  All ranks must call.

        Args:
            pinned_state_dicts: see `state_dict_shard`.
            only_on_master: the other ranks get no tensors.
        """
        self.admit_newcomers()
        boosted = EngineState(self, self.parameter_names)
        return whole_state(boosted, everywhere=not only_on_master, pinned=pinned_state_dicts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on this or another mesh, or a state dict of torch's kind."""
        mend_state(self._base)
        self.admit_newcomers()
        boosted = EngineState(self, self.parameter_names)
        Loading(boosted, "state dict", opened_state(state_dict)).apply()

    def _publish(self, groups: Sequence[Sequence[Parameter]], of: Mapping[Parameter, Tensor]) -> None:
        """Say what is trained, by param group."""
        self._working_param_groups = {index: list(params) for index, params in enumerate(groups)}
        self.master_to_working_param = {id(master): param for param, master in of.items()}

    def let_forward_wait(self, param: Any) -> None:
        """Let forward wait for the weight's gather, as ColossalAI lets it for what it wraps as trained."""
        if type(param) is not ColoParameter:
            param.__class__ = ColoParameter
            param.__init__(param, requires_grad=True)

    def adapter_access(self) -> EngineAdapters:
        """What `ReLoRaModel.merge_and_reinit` needs of this engine, between backward and `step`."""
        self._force_wait_all_gather()
        return EngineAdapters(self.masters, self._reducer, self.optim.state, self._mesh)

    @property
    def state(self) -> Any:  # type: ignore[override]
        refuse_torch_checkpoint("a boosted optimizer", "Use booster.save_optimizer(optimizer, path).")
        return self.optim.state

    def bind(self) -> None:
        """Tell the optimizer which parts its tensors are, once its groups hold what `activate` returned."""
        follow_weights(self._base, self.masters.of, self.layouts)
        if isinstance(self._base, ShardedOptimizer):
            layouts = {master: self.masters.layout(param) for param, master in self.masters.of.items()}
            keys = {master: self._keys[id(param)] for param, master in self.masters.of.items()}
            self._base.bind(layouts, self._mesh, keys)

    def _get_lr(self, *args: Any) -> Any:
        return self._base._get_lr(*args)

    def _drop_gradients(self) -> None:
        self._consumed |= self._transport.drop(self._reducer, self.masters, self._current_grad_norm)
        self._sequence.divide(self.masters.of, self._reducer.grads)
        self.show_gradients()

    def correct(self, apply: Apply) -> None:
        """Average gradients of other parameters, too, for a sink that updates them within backward."""
        self._reducer.detach()
        config = self._reducer_config()
        if apply.is_alone and math.prod(map(dist.get_world_size, config.groups)) == 1:
            # Nothing is sent: no gradient needs to wait for a bucket to fill.
            config = replace(config, bucket_size=0)
        chosen = apply.params.union(self.masters.of)
        self._reducer = GradientReducer([param for param in self.layouts if param in chosen], config, apply)

    def _say_consumed(self) -> None:
        """Say once that gradients of the last step are not added to."""
        if self._consumed and not self._said_consumed:
            self._said_consumed = True
            if dist.get_rank() == 0:
                logger.warning(
                    "backward comes after step() without optimizer.zero_grad(): the step has used up the gradients, "
                    "which do not accumulate over steps here. To accumulate, call step() after the last backward pass."
                )

    @says_where("switch of blocks")
    def _agree(self) -> None:
        fingerprint = self.trained.plan.fingerprint(self.trained.num_steps)
        require_agreement("block schedule", fingerprint, self._device)

    def _reducer_config(self) -> ReducerConfig:
        return ReducerConfig(
            groups=self.config.data_groups,
            partition=self.config.partition_grad,
            bucket_size=self.config.reduce_bucket_size,
            overlap=self.config.overlap_communication,
            communication_dtype=self.config.communication_dtype,
            whole_rows=self.masters.whole_rows,
            votes=self.trained.plan.is_whole,
            device=self._device,
            chunk=self.masters.chunk,
        )

    def _before_backward(self) -> None:
        self._say_consumed()
        if self._partition_grads and not self.require_grad_sync:
            raise ValueError(
                "no_sync: stage 2 keeps only a shard of each gradient; accumulate without no_sync, or use stage 1"
            )
        self._newcomers.look()
        self._transport.expect(self._reducer, self.masters.of)
        self._reducer.begin(self.require_grad_sync)
        self._transport.rescale(self._reducer, self.loss_scale)

    def _after_backward(self) -> None:
        if self.require_grad_sync:
            with says_where("average of gradients"):
                self._reducer.finish()
                self._newcomers.join()
            self.show_gradients()

    @says_where("norm of gradients")
    def _scale_gradients(self, loss_scale: float) -> None:
        """Undo the loss scale and clip by the global norm of what is active."""
        found = ((param, self._transport.gradient(param, master)) for param, master in self.masters.of.items())
        grads = {param: grad for param, grad in found if grad is not None}
        squares = {
            param: self._transport.square_sum(param, grad, self.masters.layout(param))
            for param, grad in grads.items()
            if param not in self._tied_elsewhere
        }
        answers = dict(zip(squares, resolve(list(squares.values()), self._mesh), strict=True))
        importance = self.trained.importance
        (totals,) = resolve([Sum(totals_of(answers, self._device, importance), ("pp",))], self._mesh)
        settings = self.config.max_norm, loss_scale, importance
        self._current_grad_norm = scale_gradients(list(grads.values()), totals, *settings)
        self.late_check.note(self._current_grad_norm)

    def _force_wait_all_gather(self) -> None:
        for param in self.masters.of:
            wait_all_gather_handle(param)


class EngineGradients:
    """The `GradientSource` of an engine, whose reducer is made anew at every switch, with a sink for what is inactive.

    Raises:
        ValueError: sequence parallelism leaves gradients that are shares of a sum.
    """

    def __init__(self, engine: ZeroOptimizer, state: CorrectionState) -> None:
        shard_config = getattr(engine.model, "shard_config", None)
        if shard_config is not None and shard_config.enable_sequence_parallelism:
            raise ValueError(
                f"sgd_mode: got {state.mode!r} with sequence parallelism "
                f"({shard_config.sequence_parallelism_mode!r}), whose gradients are partial sums within backward. Use "
                "sgd_mode='disabled' or enable_sequence_parallelism=False."
            )
        self._engine = engine
        state.bind(engine.layouts, engine._mesh)
        scaler = engine.mixed_precision_mixin
        self._config = ApplyConfig(
            correction=state,
            by_pipeline=engine.pp_pg is not None,
            tied=frozenset(param for shared in engine.shared_params for param in shared.values()),
            loss_scale=None if scaler is None else lambda: scaler.loss_scale,
            tp_group=engine.tp_pg,
        )

    def activate(self, params: Sequence[Parameter]) -> None:
        self._engine.correct(Apply(params, self._config))

    def settle(self) -> None:
        self._engine._reducer.settle()

    def clear(self) -> None:
        self._engine._reducer.clear()
