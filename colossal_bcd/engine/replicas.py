"""Averages of gradients over processes that train replicas of a model without an engine: DDP, accelerate, plain loops.

Nobody calls this package when backward begins and ends, so it looks: at forward passes (`ForwardWatch`), at gradients
that arrive at their outputs, and at gradients of parameters.  When such a backward pass ends, what is active is
averaged in one round, and `param.grad` then holds averages, as clipping between backward and step expects.

Averaging is linear, and averages stay as they are when they are averaged again: gradients of several backward passes
may be averaged one by one or together.  So ranks only need to make equally many rounds:

    a backward pass            one round at its end, whichever gradients this rank has; none under `no_sync`
    a forward pass whose       one round at its end, with zeros: other ranks' passes have gradients
    output has no gradient
    a step                     one round if there was none since the last step, or what was made under `no_sync` waits
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from colossal_bcd.block.correction.correction import CorrectionState
from colossal_bcd.block.replicas import ReplicaClient
from colossal_bcd.engine.agreement import differing, digest, fingerprints_of, gathered, is_equal, require_agreement
from colossal_bcd.engine.config import ReducerConfig
from colossal_bcd.engine.failures import says_where
from colossal_bcd.engine.forward_watch import PLUGINS, ForwardWatch, in_backward
from colossal_bcd.engine.reducer import GradientReducer
from colossal_bcd.engine.sinks import Apply, ApplyConfig
from colossal_bcd.sharding import LowRankGradient, wide

SAME_REPLICAS = (
    "Seed before the model and the optimizer are made, load the same checkpoint everywhere, or wrap the model in "
    "torch's DistributedDataParallel, which copies the weights of the first process. Processes that are no replicas of "
    "each other are given data_group=None, or data_group=the process group of those that are."
)
BUCKET = 12 * 2**20
"""Values in one collective."""

_averaged_by: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> weak reference to what averages it: a model that is wrapped again is averaged once."""


class ReplicaAverages(ForwardWatch):
    """See `colossal_bcd.block.replicas.Averages`.

    Args:
        client: the optimizer, which is not kept alive.
        choice: "auto": the group of the DDP around the model, or all processes; a process group; None: this process is
            alone.
        correction: of parameters that are not active; None: there are none.
    """

    def __init__(self, client: ReplicaClient, choice: Any, correction: CorrectionState | None) -> None:
        require_plain(client.replica_names())
        for param in client.replica_names():
            other = _averaged_by.get(param, lambda: None)()
            if other is not None:
                other.detach()
            _averaged_by[param] = weakref.ref(self)
        self._client, self._choice, self._correction = weakref.ref(client), choice, correction
        self._active: tuple[Parameter, ...] = ()
        self._corrected: tuple[Parameter, ...] = ()
        self._low_rank: dict[Parameter, LowRankGradient] = {}
        self._group: dist.ProcessGroup | None = None
        self._reducer: GradientReducer | None = None
        self._handles: list[Any] = []
        super().__init__()
        self._synced = True
        self._pass_running = self._waits = self._checked = False
        self._num_rounds = 0

    def activate(
        self,
        active: Sequence[Parameter],
        corrected: Sequence[Parameter] = (),
        low_rank: Mapping[Parameter, LowRankGradient] | None = None,
    ) -> None:
        self._active, self._corrected, self._low_rank = tuple(active), tuple(corrected), dict(low_rank or {})
        self._dismantle()
        if dist.is_initialized():
            self._build()

    def settle(self) -> None:
        if self._reducer is None:
            self._build()
        assert self._reducer is not None
        if self._num_rounds == 0 or self._waits or self._reducer.incomplete:
            self._round(last=True)
        else:
            self._reducer.start_over()
        self._num_rounds, self._pass_running = 0, False

    def clear(self) -> None:
        self._waits = False
        if self._reducer is not None:
            self._reducer.clear()

    def agree(self) -> None:
        client = self._client()
        if client is None or self._group is None:
            return
        device = self._active[0].device
        bits = fingerprints_of([*self._active, *self._corrected], device)
        require_agreement(
            "blocks and weights of replicas at a switch",
            [*client.fingerprint(), sum(bits) % 2**61],
            device,
            self._group,
            "Replicas have trained apart since the last switch: look for random numbers, clipping, or weights that are "
            "written on some ranks only. Processes that train on their own are given data_group=None.",
        )

    def detach(self) -> None:
        self._dismantle()
        self.stop_watching()
        self._active = self._corrected = ()

    def trained(self) -> Collection[Parameter]:
        return frozenset(self._active)

    def found_group(self, group: dist.ProcessGroup) -> None:
        if self._choice not in ("auto", group):
            raise ValueError(
                f"data_group: got {self._choice} and a model in a DistributedDataParallel over "
                f"{dist.get_world_size(group)} processes, expected the same group, or 'auto'. Leave data_group out."
            )
        self._choice = group
        if self._group is not group:
            self._dismantle()

    def forward_begins(self) -> None:
        # A backward pass that raised an error has had no end.
        self._pass_running = False
        if self._reducer is None:
            self._build()

    def forward_ends(self, outputs: list[Tensor], *, synced: bool, fruitless: bool) -> None:
        self._synced = synced
        for output in outputs:
            output.register_hook(partial(_on_output, weakref.ref(self), synced))
        if fruitless:
            assert self._reducer is not None
            self._reducer.begin(synced)
            self._end_pass()

    def begin_pass(self, synced: bool | None = None) -> None:
        """A gradient has come: of an output of the model, or, where it has none, of a parameter."""
        if self._pass_running or self._reducer is None:
            return
        self.wake()
        self._pass_running, self._synced = True, self._synced if synced is None else synced
        self._reducer.begin(self._synced)
        engine: Any = Variable._execution_engine
        engine.queue_callback(self._end_pass)

    def _end_pass(self) -> None:
        self._pass_running = False
        if self._synced:
            self._round()
        else:
            self._waits = True

    @says_where("average of gradients")
    def _round(self, *, last: bool = False) -> None:
        """Average what there is, on all ranks; with `last` no other micro-batch of this step will come."""
        client, reducer = self._client(), self._reducer
        if client is None or reducer is None:
            return
        if not self._checked and self._group is not None:
            require_same_replicas(client, self._group, self._active[0].device)
        self._checked = True
        if last:
            reducer.close()
        else:
            reducer.finish()
        self._num_rounds += 1
        self._waits = False
        averages = dict(reducer.grads)
        reducer.grads.clear()
        client.take_averages(averages)

    def _build(self) -> None:
        """Average from now on, over the processes that there are."""
        client = self._client()
        if client is None:
            return
        self._group = self._chosen_group()
        # Before the reducer's own hooks.
        hook = partial(_on_param, weakref.ref(self))
        trained = (*self._active, *self._corrected)
        self._handles = [param.register_post_accumulate_grad_hook(hook) for param in trained]
        groups = () if self._group is None else (self._group,)
        # Low-rank gradients are in float32 or wider, also of 16-bit gradients.
        dtypes = {wide(param.dtype) for param in self._low_rank}
        config = ReducerConfig(
            groups=groups,
            partition=False,
            bucket_size=BUCKET if groups else 0,
            overlap=self._correction is not None,
            communication_dtype=max(dtypes, key=lambda dtype: dtype.itemsize, default=None),
        )
        apply = None if self._correction is None else Apply(self._corrected, ApplyConfig(correction=self._correction))
        members = {*self._active, *self._corrected}
        order = self._active if apply is None else [param for param in client.replica_names() if param in members]
        self._reducer = GradientReducer(order, config, apply)
        self._reducer.expect(self._low_rank)

    def _chosen_group(self) -> dist.ProcessGroup | None:
        group = self._choice
        if group == "auto":
            group = dist.group.WORLD if dist.is_initialized() else None
        return group if group is not None and dist.get_world_size(group) > 1 else None

    def _dismantle(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._reducer is not None:
            self._reducer.detach()
        self._reducer, self._waits = None, False


def _on_output(averages: weakref.ref[ReplicaAverages], synced: bool, grad: Tensor) -> None:
    found = averages()
    if found is not None and in_backward():
        found.begin_pass(synced)


def _on_param(averages: weakref.ref[ReplicaAverages], param: Tensor) -> None:
    found = averages()
    if found is not None:
        found.begin_pass()


def require_plain(names: Mapping[Parameter, str]) -> None:
    """Refuse parameters that other libraries have sharded: a DTensor, or DeepSpeed's."""
    for param, name in names.items():
        if isinstance(param, DTensor) or hasattr(param, "ds_id") or hasattr(param, "_fqns"):
            raise ValueError(
                f"BlockOptimizer on several processes: parameter {name!r} is a {type(param).__name__} of which this "
                "process has a part, expected whole parameters on every process. Use torch's DDP instead of FSDP or "
                f"DeepSpeed's ZeRO-3, or {PLUGINS}, which shards what trains."
            )


def require_same_replicas(client: ReplicaClient, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare names, shapes, dtypes, bits of all weights, and what trains when: one small collective."""
    names = client.replica_names()
    shapes = [f"{name} {tuple(param.shape)} {param.dtype}" for param, name in names.items()]
    weights = fingerprints_of(list(names), device)
    plan = client.fingerprint()
    if is_equal([digest(shapes), digest(plan), digest(weights)], device, (group,)):
        return
    everyone = gathered((shapes, plan, weights), group)
    different = differing(everyone)
    raise ValueError(
        f"replicas: {_difference(everyone[different[0]], everyone[0])} on ranks {different} and on rank 0, expected "
        f"equal replicas. {SAME_REPLICAS}"
    )


def _difference(theirs: Any, first: Any) -> str:
    if theirs[0] != first[0]:
        got, expected = set(theirs[0]) - set(first[0]), set(first[0]) - set(theirs[0])
        return f"got other parameters ({sorted(got)[:3]} instead of {sorted(expected)[:3]})"
    if theirs[2] != first[2]:
        wrong = [name for name, a, b in zip(first[0], theirs[2], first[2], strict=True) if a != b]
        return f"got other weights in {len(wrong)} of {len(first[0])} parameters, such as {wrong[0].split()[0]!r},"
    return "got other blocks, or another schedule or progress in it,"
