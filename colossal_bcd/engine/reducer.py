"""Averages gradients over the data-parallel ranks, in buckets fixed by layout, while backward produces them.

W: data-parallel ranks; a parameter counts as W rows of `slice_length` values, the last ones padded with zeros.  So does
the low-rank image that an optimizer wants instead of a gradient: it is made in the hook, where the gradient ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from colossal_bcd.engine.sharded_gradient import ShardedGradient
from colossal_bcd.sharding import LowRankGradient, slice_length, wide
from colossal_bcd.sharding.packing import pack


@dataclass(frozen=True, kw_only=True)
class ReducerConfig:
    """How gradients are averaged."""

    groups: tuple[dist.ProcessGroup, ...]
    """The data-parallel group, or the groups whose product it is."""
    partition: bool
    """Keep only this rank's row (ZeRO stage 2) instead of the whole gradient."""
    bucket_size: int
    """Largest number of values in one collective; a larger parameter is a bucket of its own."""
    overlap: bool
    """Start a bucket's collective as soon as backward has filled it."""
    communication_dtype: torch.dtype | None = None
    """Dtype on the wire, of images, too; None is the gradient's."""
    whole_rows: bool = False
    """See `slice_length`; the same as the masters'."""
    votes: bool = False
    """Say in the first bucket of a pass whether this rank has `joining`; with no parameters in a bucket of its own."""
    device: torch.device | None = None
    """Where the groups communicate, for a bucket without parameters."""
    chunk: int = 1
    """See `slice_length`; the same as the masters'."""

    @property
    def sizes(self) -> list[int]:
        return [dist.get_world_size(group) for group in self.groups]


@dataclass
class _Bucket:
    """Parameters that travel together."""

    params: list[Parameter]
    partition: bool
    """Each rank receives its row only."""
    ready: set[Parameter] = field(default_factory=set)
    had_grad: list[bool] = field(default_factory=list)
    votes: bool = False
    """Two more values travel at the end: whether any rank has parameters that join, and whether any has none."""
    buffer: Tensor | None = None
    sent: Tensor | None = None
    """Held until the collective ends, which does not own what it sends."""
    handle: dist.Work | None = None


class GradientReducer:
    """Gradient averages of one set of parameters, from hooks to results.

    Buckets are formed in reverse order of the parameters and start in that order on every rank, whichever gradient
    is ready first, so ranks cannot pair different buckets.  A parameter without a gradient on some rank takes part with
    zeros; a flag per parameter travels behind the values, so that one that has no gradient on any rank is left alone.

    Attributes:
        grads: averaged gradients since the last `clear`, flat: this rank's row with `partition`, else all [n]; a
            parameter that had no gradient on any rank is absent.  Of a parameter in `images` its image, in float32 or
            wider: this rank's row of `LowRankGradient.rows`, or the shard's image.
        images: what was given to `expect`.
        shown: parameters whose `grad` stands for the average in `grads`, and whether it is the average; see `show`.
        joining: parameters that this rank wants to train from now on; their gradients stay where they are until
            `cover`, because other ranks may not know of them.
        asked: `joining` as the last finished pass said it to the other ranks.
        votes: [2] above 0 where any rank had parameters that join, and where any had none, in the last finished pass,
            the same on all ranks; None where nothing travels.
    """

    def __init__(self, params: Sequence[Parameter], config: ReducerConfig) -> None:
        self.config = config
        self.enabled = True
        self.grads: dict[Parameter, Tensor] = {}
        self.images: dict[Parameter, LowRankGradient] = {}
        self.shown: dict[Parameter, bool] = {}
        self.joining: tuple[Parameter, ...] = ()
        self.asked: tuple[Parameter, ...] = ()
        self.votes: Tensor | None = None
        self._finished = False
        """Whether all ranks have finished a pass since gradients were last cleared or a pass begun."""
        self._local: dict[Parameter, Tensor] = {}
        """Images of this rank's gradients that are not reduced yet, flat."""
        self._params = tuple(params)
        self._world = math.prod(config.sizes)
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
        return not self.grads and not self._local and self._next == 0

    def expect(self, images: Mapping[Parameter, LowRankGradient]) -> None:
        """From now on reduce images of these parameters' gradients, the same on all ranks, and whole ones of others."""
        assert self.pristine
        again = images.keys() != self.images.keys()
        self.images = dict(images)
        if again:
            self._arrange()

    def _arrange(self) -> None:
        self._buckets = self._plan(self._params)
        self._bucket_of = {param: bucket for bucket in self._buckets for param in bucket.params}

    def detach(self) -> None:
        """Remove the hooks and forget everything."""
        for handle in self._handles.values():
            handle.remove()
        self.clear()

    def clear(self) -> None:
        """Forget gradients, reduced or not."""
        self.take_back()
        self.grads.clear()
        for param in self.joining:
            param.grad = None
        self._finished = False
        self._reset()

    @property
    def unfinished(self) -> bool:
        """Whether gradients wait to be averaged: backward ran under `no_sync` or not through the engine."""
        fresh = (param.grad is not None for param in (*self._bucket_of, *self.joining) if param not in self.shown)
        return self._next > 0 or bool(self._local) or any(fresh)

    @property
    def checked(self) -> list[Tensor]:
        """What loss scaling looks for overflow in."""
        return list(self.grads.values())

    def begin(self, synced: bool) -> None:
        """Start of a backward pass, whose gradients are averaged if `synced`."""
        self.take_back()
        self.enabled, self._finished = synced, False

    def show(self, *, alone: bool) -> None:
        """Let each `param.grad` be the average, without a copy, or a `ShardedGradient` where that would be a part only.

        Args:
            alone: data-parallel ranks are all ranks, so that the gradients here are those of the whole model, and
                they have no loss scale.
        """
        for param, grad in self.grads.items():
            is_whole = alone and param not in self.images and (self._world == 1 or not self.config.partition)
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
            self.finish()

    def finish(self) -> None:
        """End of a backward pass: reduce what is left, wait, and add the averages to `grads`."""
        self.take_back()
        while self._next < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            self._receive(bucket)
        self._reset()
        self._finished = True

    @property
    def handles(self) -> list[RemovableHandle]:
        """Of the hooks on the parameters."""
        return list(self._handles.values())

    def drop_buckets(self) -> None:
        """Forget what is on its way, not what has been averaged."""
        self._reset()

    def _reset(self) -> None:
        self._next = 0
        self._local.clear()
        for bucket in self._buckets:
            bucket.ready.clear()
            bucket.had_grad, bucket.buffer, bucket.sent, bucket.handle = [], None, None, None

    def _plan(self, params: Sequence[Parameter]) -> list[_Bucket]:
        packed = pack(reversed(params), self._numel, self.config.bucket_size, self._kind)
        buckets = [_Bucket(members, self._is_partitioned(members[0])) for members in packed]
        if not buckets and self.config.votes:
            buckets.append(_Bucket([], partition=False))
        for bucket in buckets[:1]:
            bucket.votes = self.config.votes
        return buckets

    def _is_partitioned(self, param: Parameter) -> bool:
        """Whether this rank needs its row of the gradient only."""
        return self.config.partition and (param not in self.images or self.images[param].divided)

    def _kind(self, param: Parameter) -> tuple[object, ...]:
        """Parameters of different kinds share no bucket."""
        return param.dtype, self._is_partitioned(param)

    def _is_ready(self, bucket: _Bucket) -> bool:
        return len(bucket.ready) == len(bucket.params)

    def _on_grad(self, param: Parameter) -> None:
        if param in self.shown:
            # Backward was called past the engine and has added to the average, which is averaged again with the rest.
            del self.shown[param], self.grads[param]
        self._project(param)
        if not self.enabled or not (self.config.overlap or self.config.partition):
            return
        bucket = self._bucket_of[param]
        if bucket.had_grad and self._world > 1:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} received a second gradient in one backward pass after its "
                "bucket was reduced, expected one. Reentrant gradient checkpointing of shared layers does that: use "
                "use_reentrant=False, or stage 1 with overlap_communication=False."
            )
        bucket.ready.add(param)
        while self._next < len(self._buckets) and self._is_ready(self._buckets[self._next]):
            self._launch()

    def _project(self, param: Parameter) -> None:
        """Turn the gradient into its image, where that is expected, and drop it."""
        image = self.images.get(param)
        if image is None or param.grad is None:
            return
        _refuse_sparse(param, param.grad)
        flat = image.of(param.grad)
        param.grad = None
        if param in self._local:
            self._local[param].add_(flat)
        else:
            self._local[param] = flat

    def _numel(self, param: Parameter) -> int:
        return self.images[param].numel if param in self.images else param.numel()

    def _length(self, param: Parameter) -> int:
        if param not in self.images:
            config = self.config
            return slice_length(param.shape, self._world, whole_rows=config.whole_rows, chunk=config.chunk)
        image = self.images[param]
        return image.part_numel if self._is_partitioned(param) else slice_length((image.numel,), self._world)

    def _rows(self, param: Parameter) -> Tensor | None:
        """[W, length] what this rank has of the parameter's gradient or image, which it gives up."""
        length = self._length(param)
        flat = self._local.pop(param, None)
        if flat is not None and self._is_partitioned(param):
            return self.images[param].rows(flat)
        if flat is None and param.grad is not None:
            _refuse_sparse(param, param.grad)
            flat, param.grad = param.grad.reshape(-1), None
        if flat is None:
            return None
        if flat.numel() < self._world * length:
            flat = torch.nn.functional.pad(flat, (0, self._world * length - flat.numel()))
        return flat.view(self._world, length)

    def _launch(self) -> None:
        """Pack the next bucket, free its gradients and start its collective."""
        bucket = self._buckets[self._next]
        self._next += 1
        if bucket.votes:
            self.asked = self.joining
        for param in bucket.params:
            self._project(param)
        bucket.had_grad = [param.grad is not None or param in self._local for param in bucket.params]
        if self._world == 1:
            return
        buffer = self._pack(bucket)
        if self.config.communication_dtype is not None:
            buffer = buffer.to(self.config.communication_dtype)
        groups, last = self.config.groups, len(self.config.groups) - 1
        for index, (group, size) in enumerate(zip(groups, self.config.sizes, strict=True)):
            # Work of one collective may overlap backward; the next one of a product of groups needs its result.
            overlapped = index == last
            bucket.sent = buffer
            if bucket.partition:
                received = torch.empty_like(buffer.view(size, -1)[0])
                bucket.handle = dist.reduce_scatter_tensor(received, buffer.view(-1), group=group, async_op=overlapped)
                buffer = received
            else:
                bucket.handle = dist.all_reduce(buffer, group=group, async_op=overlapped)
        bucket.buffer = buffer.view(-1, self._width(bucket))

    def _width(self, bucket: _Bucket) -> int:
        """Values in a row of the bucket: each parameter's, a flag for each, and the votes."""
        return sum(map(self._length, bucket.params)) + len(bucket.params) + (2 if bucket.votes else 0)

    def _pack(self, bucket: _Bucket) -> Tensor:
        """[W, row]: each parameter's rows side by side, a flag per parameter, and the votes; divided by W."""
        lengths = [self._length(param) for param in bucket.params]
        dtype, device = torch.float32, self.config.device
        if bucket.params:
            dtype, device = bucket.params[0].dtype, bucket.params[0].device
        shape = self._world, self._width(bucket)
        # What is sent in a wider dtype must not be rounded to the gradients' first: images are float32.
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

    def _receive(self, bucket: _Bucket) -> None:
        """Wait for a bucket, copy its parts into `grads` and free it."""
        if self._world == 1:
            for param in bucket.params:
                rows = self._rows(param)
                if rows is not None:
                    self._add(param, rows.view(-1)[: self._numel(param)])
            return
        assert bucket.buffer is not None
        if bucket.handle is not None:
            bucket.handle.wait()
        bucket.sent = None
        if bucket.votes:
            self.votes = bucket.buffer[0, -2:].clone()
        had_grad = bucket.had_grad
        if not all(had_grad):
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
                dtype = wide(param.dtype) if param in self.images else param.dtype
                self._add(param, flat.to(dtype, copy=shared))
        bucket.buffer, bucket.handle = None, None

    def _add(self, param: Parameter, grad: Tensor) -> None:
        """Accumulate over backward passes."""
        if param in self.grads:
            self.grads[param].add_(grad)
        else:
            self.grads[param] = grad


def _refuse_sparse(param: Parameter, grad: Tensor) -> None:
    if grad.is_sparse:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has a sparse gradient, expected a dense one. "
            "Build its embedding with sparse=False."
        )
