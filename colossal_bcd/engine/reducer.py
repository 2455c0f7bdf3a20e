"""Averages gradients over the data-parallel ranks, in buckets fixed by layout, while backward produces them.

W: data-parallel ranks; a parameter counts as W rows of `slice_length` values, the last ones padded with zeros.  So does
the low-rank gradient that an optimizer wants instead: it is made in the hook, where the gradient ends.

Layout decides which parameters are a bucket, and that bucket A is sent before B on every rank; a rank's backward
decides only when.  Gradients become ready in different orders:

    time    ->
    rank 0  g4 g3 g2 g1          | finish      A = {g4, g3} is ready, then B = {g2, g1}: each is sent at once
    A            [ average ]
    B                  [ average ]
    rank 1  g2 g1    g4 g3       | finish      B is ready first and waits, else rank 0 would pair its A with this B
    A                  [ average ]
    B                   [ average ]

`finish` sends what is not ready, with zeros for gradients that did not come, and waits for all of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from colossal_bcd.engine.config import ReducerConfig
from colossal_bcd.engine.sinks import Apply
from colossal_bcd.sharding import LowRankGradient, slice_length, wide
from colossal_bcd.sharding.packing import pack


@dataclass(eq=False)
class Bucket:
    """Parameters that travel together, to one sink: `apply`, or the reducer's `grads`, which keep averages."""

    params: list[Parameter]
    partition: bool
    """Each rank receives its row only."""
    apply: Apply | None = None
    votes: bool = False
    """Two more values travel at the end: whether any rank has parameters that join, and whether any has none."""
    ready: set[Parameter] = field(default_factory=set)
    had_grad: list[bool] = field(default_factory=list)
    sent: bool = False
    """Its averages are on their way, and have not reached the sink."""
    buffer: Tensor | None = None
    source: Tensor | None = None
    """Alive until the collective ends, which does not own what it sends."""
    handle: dist.Work | None = None

    @property
    def is_ready(self) -> bool:
        """Whether all gradients are there, or none of them is sent in this pass."""
        return len(self.ready) == len(self.params) or not self.travels

    @property
    def travels(self) -> bool:
        """Whether its averages are made in this pass."""
        return self.apply is None or self.apply.micro_batches.is_last

    def reset(self) -> None:
        """As before a pass."""
        self.ready.clear()
        self.had_grad, self.sent, self.buffer, self.source, self.handle = [], False, None, None, None


class GradientReducer:
    """Gradient averages of one set of parameters, from hooks to results.

    A parameter without a gradient on some rank takes part with zeros; a flag per parameter travels behind the values,
    so that one that has no gradient on any rank is left alone.

    A bucket of `apply` is in the sequence like any other, but its weights are updated when the next such bucket is
    sent, so that a collective overlaps backward and at most two of them exist; without `overlap` it is waited for.

    Args:
        params: parameters in model order, the same on every rank.
        config: see `ReducerConfig`.
        apply: sink of those among them whose averages no step takes; with it collectives start within backward in any
            case, as that is where gradients are freed.

    Attributes:
        grads: averaged gradients since the last `clear`, flat: this rank's row with `partition`, else all [n]; a
            parameter that had no gradient on any rank is absent.  Of a parameter in `low_rank` its low-rank gradient,
            in float32 or wider: this rank's row of `LowRankGradient.rows`, or the shard's.
        low_rank: what was given to `expect`.
        shown: parameters whose `grad` stands for the average in `grads`, and whether it is the average; see `show`.
        joining: parameters that this rank wants to train from now on; their gradients stay where they are until
            `cover`, because other ranks may not know of them.
        asked: `joining` as the last finished pass said it to the other ranks.
        votes: [2] above 0 where any rank had parameters that join, and where any had none, in the last finished pass,
            the same on all ranks; None where nothing travels.
    """

    def __init__(self, params: Sequence[Parameter], config: ReducerConfig, apply: Apply | None = None) -> None:
        self._sizes = [dist.get_world_size(group) for group in config.groups]
        self._world = math.prod(self._sizes)
        self._in_flight = 1 if config.overlap and self._world > 1 else 0
        self._flying: deque[Bucket] = deque()
        self.config = config if apply is None else replace(config, overlap=True)
        self.apply = apply
        self.enabled = True
        self.grads: dict[Parameter, Tensor] = {}
        self.low_rank: dict[Parameter, LowRankGradient] = {}
        self.shown: dict[Parameter, bool] = {}
        self.joining: tuple[Parameter, ...] = ()
        self.asked: tuple[Parameter, ...] = ()
        self.votes: Tensor | None = None
        self._finished = False
        """Whether all ranks have finished a pass since gradients were last cleared or a pass begun."""
        self._local: dict[Parameter, Tensor] = {}
        """Low-rank gradients of this rank that are not reduced yet, flat."""
        self._params = tuple(params)
        self._arrange()
        self._next = 0
        self._handles = {param: param.register_post_accumulate_grad_hook(self._on_grad) for param in params}

    def cover(self, params: Sequence[Parameter], grads: Mapping[Parameter, Tensor]) -> None:
        """Average the gradients of more parameters, between two passes; what has accumulated stays.

        Args:
            params: all parameters from now on, in order, the same on all ranks.
            grads: averaged gradients of those that join, as in the attribute.
        """
        assert self._next == 0
        self._params, self.joining = tuple(params), ()
        self.grads.update(grads)
        self._arrange()
        for param in params:
            if param not in self._handles:
                self._handles[param] = param.register_post_accumulate_grad_hook(self._on_grad)

    @property
    def pristine(self) -> bool:
        """Whether nothing has been reduced or projected since the last step."""
        fresh = self.apply is None or self.apply.pristine
        return fresh and not self.grads and not self._local and self._next == 0

    def expect(self, low_rank: Mapping[Parameter, LowRankGradient]) -> None:
        """Reduce low-rank gradients of these parameters, the same on all ranks, and whole ones of others."""
        assert self.pristine
        again = low_rank.keys() != self.low_rank.keys()
        self.low_rank = dict(low_rank)
        if again:
            self._arrange()

    def _arrange(self) -> None:
        packed = pack(reversed(self._params), self._numel, self.config.bucket_size, self._kind)
        self._buckets = [Bucket(members, *self._kind(members[0])[1:]) for members in packed]
        if not self._buckets and self.config.votes:
            self._buckets = [Bucket([], partition=False)]
        if self._buckets:
            self._buckets[0].votes = self.config.votes
        self._bucket_of = {param: bucket for bucket in self._buckets for param in bucket.params}

    def detach(self) -> None:
        """Remove the hooks and forget everything."""
        for handle in self._handles.values():
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Forget gradients, reduced or not."""
        if self.apply is not None:
            self.apply.clear()
        self.take_back()
        self.grads.clear()
        for param in self.joining:
            param.grad = None
        self._finished = False
        self.drop_buckets()

    @property
    def unfinished(self) -> bool:
        """Whether gradients wait to be averaged: backward ran under `no_sync` or not through the engine."""
        fresh = (param.grad is not None for param in (*self._bucket_of, *self.joining) if param not in self.shown)
        return self.incomplete or self._next > 0 or bool(self._local) or any(fresh)

    @property
    def checked(self) -> list[Tensor]:
        """What loss scaling looks for overflow in."""
        return [*self.grads.values(), *([] if self.apply is None else self.apply.overflow)]

    @property
    def incomplete(self) -> bool:
        """Whether `apply` waits for another micro-batch of a step that has begun."""
        return self.apply is not None and self.apply.micro_batches.incomplete

    def begin(self, synced: bool) -> None:
        """Start of a backward pass, whose gradients are averaged if `synced`."""
        self.take_back()
        self.enabled, self._finished = synced, False
        if self.apply is not None:
            self.apply.begin(synced=synced)

    def show(self, *, alone: bool) -> None:
        """Let each `param.grad` be the average, without a copy, or a `ShardedGradient` where that would be a part only.

        Args:
            alone: data-parallel ranks are all ranks, so that the gradients here are those of the whole model, and
                they have no loss scale.
        """
        for param, grad in self.grads.items():
            is_whole = alone and param not in self.low_rank and (self._world == 1 or not self.config.partition)
            param.grad = grad.view(param.shape) if is_whole else ShardedGradient(param)
            self.shown[param] = is_whole

    def take_back(self) -> None:
        """End of `show`: what was put in the place of a gradient counts instead of it, and None for none.

        Raises:
            ValueError: a gradient was put in the place of one that is a part only.
        """
        for param, is_whole in self.shown.items():
            grad, param.grad = param.grad, None
            if grad is None:
                self.grads.pop(param, None)
            elif is_whole:
                _refuse_sparse(param, grad)
                self.grads[param] = grad.reshape(-1)
            elif not isinstance(grad, ShardedGradient):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} was given a gradient by hand, expected the one that "
                    "backward has left, as ranks hold parts of it, or it has the loss scale. Change gradients with "
                    "ZeRO stage 0 or 1, without tensor and pipeline parallelism and fp16."
                )
        self.shown.clear()

    def settle(self) -> None:
        """Before a step: average what waits.

        A rank on which nothing waits takes part, too, unless a pass was finished on all ranks: where backward ran
        without collectives, another rank may have gradients that this one has not.
        """
        self.take_back()
        if self.unfinished or not self._finished:
            self.close()
        self.start_over()

    def close(self) -> None:
        """Average and apply what there is as if the last micro-batch had come, and begin the next step."""
        if self.apply is not None:
            self.apply.micro_batches.is_last = True
        self._finish()
        self.start_over()

    def start_over(self) -> None:
        """The next gradient is the first one of a step."""
        if self.apply is not None:
            self.apply.micro_batches.start_over()

    def finish(self) -> None:
        """End of a backward pass: reduce what is left, wait, and give the averages to their sinks."""
        if self.apply is not None:
            self.apply.micro_batches.end()
        self._finish()

    def _finish(self) -> None:
        self.take_back()
        while self._next < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            self._receive(bucket)
        self.drop_buckets()
        self._finished = True
        if self.apply is not None:
            self.apply.micro_batches.ended()

    @property
    def handles(self) -> list[RemovableHandle]:
        """Of the hooks on the parameters."""
        return list(self._handles.values())

    def drop_buckets(self) -> None:
        """Forget what is on its way, not what has been averaged."""
        self._next = 0
        self._local.clear()
        self._flying.clear()
        for bucket in self._buckets:
            bucket.reset()

    def _is_partitioned(self, param: Parameter) -> bool:
        """Whether this rank needs its row of the gradient only."""
        return self._kind(param)[1]

    def _kind(self, param: Parameter) -> tuple[torch.dtype, bool, Apply | None]:
        """Dtype, whether each rank receives its row only, and the sink; parameters that differ share no bucket."""
        apply = self.apply if self.apply is not None and param in self.apply.params else None
        divided = param not in self.low_rank or self.low_rank[param].divided
        return param.dtype, self.config.partition and divided and apply is None, apply

    def _on_grad(self, param: Parameter) -> None:
        bucket = self._bucket_of[param]
        if bucket.apply is not None and not bucket.travels:
            bucket.apply.postpone(param)
            return
        if param in self.shown:
            # Backward was called past the engine and has added to the average, which is averaged again with the rest.
            del self.shown[param], self.grads[param]
        self._project(param)
        if not self.enabled or not (self.config.overlap or self.config.partition):
            return
        if bucket.had_grad and self._world > 1:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} received a second gradient in one backward pass after its "
                "bucket was reduced, expected one. Reentrant gradient checkpointing of shared layers does that: use "
                "use_reentrant=False, or stage 1 with overlap_communication=False."
            )
        bucket.ready.add(param)
        while self._next < len(self._buckets) and self._buckets[self._next].is_ready:
            self._launch()

    def _project(self, param: Parameter) -> None:
        """Turn the gradient into its low-rank gradient, where that is expected, and drop it."""
        low_rank = self.low_rank.get(param)
        if low_rank is None or param.grad is None:
            return
        _refuse_sparse(param, param.grad)
        flat = low_rank.of(param.grad)
        param.grad = None
        if param in self._local:
            self._local[param].add_(flat)
        else:
            self._local[param] = flat

    def _numel(self, param: Parameter) -> int:
        return self.low_rank[param].numel if param in self.low_rank else param.numel()

    def _length(self, param: Parameter) -> int:
        if param not in self.low_rank:
            config = self.config
            return slice_length(param.shape, self._world, whole_rows=config.whole_rows, chunk=config.chunk)
        low_rank = self.low_rank[param]
        return low_rank.part_numel if self._is_partitioned(param) else slice_length((low_rank.numel,), self._world)

    def _rows(self, param: Parameter) -> Tensor | None:
        """[W, length] what this rank has of the parameter's whole or low-rank gradient, which it gives up."""
        length = self._length(param)
        flat = self._local.pop(param, None)
        if flat is not None and self._is_partitioned(param):
            return self.low_rank[param].rows(flat)
        if flat is None and param.grad is not None:
            _refuse_sparse(param, param.grad)
            flat, param.grad = param.grad.reshape(-1), None
        if flat is None:
            return None
        if flat.numel() < self._world * length:
            flat = torch.nn.functional.pad(flat, (0, self._world * length - flat.numel()))
        return flat.view(self._world, length)

    def _launch(self) -> None:
        """Pack the next bucket, free its gradients and start its collective, if it travels in this pass."""
        bucket = self._buckets[self._next]
        self._next += 1
        if not bucket.travels:
            return
        if bucket.apply is not None:
            bucket.apply.bring_back(bucket.params)
        if bucket.votes:
            self.asked = self.joining
        for param in bucket.params:
            self._project(param)
        bucket.had_grad = [param.grad is not None or param in self._local for param in bucket.params]
        bucket.sent = True
        if self._world > 1:
            self._send(bucket)
        if bucket.apply is not None:
            self._flying.append(bucket)
            while len(self._flying) > self._in_flight:
                self._receive(self._flying.popleft())

    def _send(self, bucket: Bucket) -> None:
        buffer = self._pack(bucket)
        if self.config.communication_dtype is not None:
            buffer = buffer.to(self.config.communication_dtype)
        for index, (group, size) in enumerate(zip(self.config.groups, self._sizes, strict=True)):
            # Work of one collective may overlap backward; the next one of a product of groups needs its result.
            overlapped = index == len(self.config.groups) - 1
            bucket.source = buffer
            if bucket.partition:
                received = torch.empty_like(buffer.view(size, -1)[0])
                bucket.handle = dist.reduce_scatter_tensor(received, buffer.view(-1), group=group, async_op=overlapped)
                buffer = received
            else:
                bucket.handle = dist.all_reduce(buffer, group=group, async_op=overlapped)
        bucket.buffer = buffer.view(-1, self._width(bucket))

    def _width(self, bucket: Bucket) -> int:
        """Values in a row of the bucket: each parameter's, a flag for each, and the votes."""
        return sum(map(self._length, bucket.params)) + len(bucket.params) + (2 if bucket.votes else 0)

    def _pack(self, bucket: Bucket) -> Tensor:
        """[W, row]: each parameter's rows side by side, a flag per parameter, and the votes; divided by W."""
        lengths = [self._length(param) for param in bucket.params]
        dtype, device = torch.float32, self.config.device
        if bucket.params:
            dtype, device = bucket.params[0].dtype, bucket.params[0].device
        shape = self._world, self._width(bucket)
        # What is sent in a wider dtype must not be rounded to the gradients' first: low-rank gradients are float32.
        dtype = torch.promote_types(dtype, self.config.communication_dtype or dtype)
        buffer = torch.zeros(shape, dtype=dtype, device=device)
        offset = 0
        for param, length in zip(bucket.params, lengths, strict=True):
            rows = self._rows(param)
            if rows is not None:
                buffer[:, offset : offset + length] = rows
            offset += length
        flags = bucket.had_grad + ([bool(self.joining), not self.joining] if bucket.votes else [])
        buffer[:, offset:] = torch.tensor(flags, dtype=buffer.dtype, device=buffer.device)
        return buffer.div_(self._world)

    def _receive(self, bucket: Bucket) -> None:
        """Wait for a bucket, give its averages to its sink and free it."""
        if not bucket.sent:
            return
        if bucket.handle is not None:
            bucket.handle.wait()
        if bucket.apply is not None:
            raw = [p.grad for p in bucket.params if p.grad is not None] if bucket.buffer is None else [bucket.buffer]
            bucket.apply.take(self._averages(bucket), raw, bucket.params[0].device)
        else:
            for param, average in self._averages(bucket):
                if param in self.grads:  # of an earlier pass
                    self.grads[param].add_(average)
                else:
                    self.grads[param] = average
        bucket.sent, bucket.buffer, bucket.source, bucket.handle = False, None, None, None

    def _averages(self, bucket: Bucket) -> Iterator[tuple[Parameter, Tensor]]:
        """Flat averages of the parameters that had a gradient on any rank, made one by one."""
        if bucket.buffer is None:
            for param in bucket.params:
                rows = self._rows(param)
                if rows is not None:
                    yield param, rows.view(-1)[: self._numel(param)]
            return
        bucket.source = None
        if bucket.votes:
            self.votes = bucket.buffer[0, -2:].clone()
        if not all(had_grad := bucket.had_grad):
            end = self._width(bucket) - (2 if bucket.votes else 0)
            had_grad = (bucket.buffer[0, end - len(bucket.params) : end] > 0).tolist()
        offset = 0
        for param, present in zip(bucket.params, had_grad, strict=True):
            length = self._length(param)
            part = bucket.buffer[:, offset : offset + length]
            offset += length
            if present:
                flat = part.reshape(-1)
                if not bucket.partition:
                    flat = flat[: self._numel(param)]
                shared = flat.untyped_storage().data_ptr() == bucket.buffer.untyped_storage().data_ptr()
                dtype = wide(param.dtype) if param in self.low_rank else param.dtype
                yield param, flat.to(dtype, copy=shared)


def _refuse_sparse(param: Parameter, grad: Tensor) -> None:
    if grad.is_sparse:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has a sparse gradient, expected a dense one. "
            "Build its embedding with sparse=False."
        )


class ShardedGradient(Tensor):
    """Says that there is a gradient, without memory; what reads or changes its values raises.

    None would let `torch.nn.utils.clip_grad_norm_` return 0.0 and clip nothing.

    Args:
        param: whose gradient it is; it has its shape, dtype and device.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, param: Tensor) -> ShardedGradient:
        zero = torch.zeros((), dtype=param.dtype, device=param.device)
        return Tensor._make_subclass(cls, zero.expand(param.shape))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise ValueError(
            f"param.grad: got {func.overloadpacket.__name__} on a gradient that is divided over ranks (ZeRO stage 2, "
            "tensor or pipeline parallelism), held in low rank, or multiplied by a loss scale (fp16), expected nothing "
            "to read or change it. Clip with "
            "optimizer.clip_grad_by_norm(...) or the plugin's max_norm, read optimizer.get_grad_norm() after the step, "
            "drop gradients with optimizer.zero_grad(), and call backward through the booster."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ShardedGradient(shape={tuple(self.shape)}, dtype={self.dtype})"
