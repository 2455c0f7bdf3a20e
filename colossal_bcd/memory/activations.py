"""What a forward and a backward pass keep alive besides the weights, counted on tensors that have no memory.

The model's own code runs under torch's FakeTensorMode, so that what is counted is what autograd saves and what backward
makes, whatever the architecture: for a layer of Megatron's GPT that is the sum of Korthikanti et al. (arXiv 2205.05198,
section 4.1), for others another one, and gradient checkpointing leaves the inputs of layers and one layer at a time.

A model of many equal layers is not run as it is: two small ones are, and every moment that can be the largest is
extrapolated.  What is alive then grows by the same bytes for each further layer:

    forward    layers fill with what they save         | head: logits and loss
    backward   head | top layer: most is alive | ... | bottom layer: least is alive, and all gradients
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colossal_bcd.names import role_of

Build = Callable[[int], tuple[nn.Module, Callable[[], Tensor]]]
"""Number of layers -> a model with so many, and what gives its loss; called where tensors have no memory."""

HEAD, TOP, BOTTOM = "head", "top", "bottom"


@dataclass(frozen=True)
class Moment:
    """Bytes that are alive at one time of a pass."""

    activations: int = 0
    """All but gradients that have come to their parameters: what autograd has saved, and temporaries."""
    gradients: int = 0

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.activations + other.activations, self.gradients + other.gradients)

    def __sub__(self, other: Moment) -> Moment:
        return self + other.times(-1)

    def times(self, factor: int) -> Moment:
        """Every count, times a number."""
        return Moment(self.activations * factor, self.gradients * factor)

    @property
    def total(self) -> int:
        return self.activations + self.gradients


@dataclass(frozen=True)
class Passes:
    """The moments of one forward and backward pass among which the largest is."""

    moments: Mapping[str, Moment]
    """By the part of the pass in which each is: the one with most bytes in it."""
    saved: int
    """Bytes that are alive between forward and backward."""
    saved_per_layer: int
    """Of these, the bytes of each layer; an average where the model was run as it is."""
    num_layers: int

    @property
    def peak(self) -> Moment:
        return max(self.moments.values(), key=lambda moment: moment.total)

    @property
    def most_activations(self) -> int:
        """Bytes alive at most where gradients leave as they come."""
        return max(moment.activations for moment in self.moments.values())


def passes(build: Build, num_layers: int, num_first: int = 1) -> Passes:
    """Count what one forward and backward pass keeps alive.

    Args:
        build: see `Build`; parameters in the order and with the `requires_grad` that the whole model has.
        num_layers: of the whole model.
        num_first: layers from the first on that differ from the others, as they alone are trained.
    Raises:
        ValueError: what is asked for does not run.
    """
    small = num_first + 2
    if num_layers <= small + 1:
        return _run(build, num_layers)
    less, more = _run(build, small), _run(build, small + 1)
    further = num_layers - small
    moments = {
        name: less.moments[name] + (more.moments[name] - less.moments[name]).times(further) for name in less.moments
    }
    per_layer = more.saved - less.saved
    return Passes(moments, less.saved + per_layer * further, per_layer, num_layers)


def _run(build: Build, num_layers: int) -> Passes:
    with FakeTensorMode(), torch.device("cpu"):
        model, loss_of = build(num_layers)
        watch = _Watch(model)
        with watch:
            loss = loss_of()
            saved = watch.now.activations
            loss.backward()
        del loss
        return Passes(dict(watch.largest), saved, saved // num_layers, num_layers)


class _Watch(TorchDispatchMode):
    """Counts the storages that are alive, those of gradients apart.

    Args:
        model: whose weights count for nothing.
    Attributes:
        now: what is alive.
        largest: by part of the pass, what was alive when that was most.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now, self.largest, self._part = Moment(), {HEAD: Moment()}, HEAD
        self._bytes: dict[int, tuple[int, bool]] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            self._add(tensor, 0)
        for param in model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._on_gradient)
        layers = dict.fromkeys(layer for name, _ in model.named_parameters() if (layer := role_of(name).layer))
        parts = [TOP] * (len(layers) - 1)
        for name, part in zip(layers, [BOTTOM, *parts], strict=True):
            model.get_submodule(name).register_forward_hook(self._begins(part))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor, num_bytes: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        size = storage.nbytes() if num_bytes is None else num_bytes
        self._bytes[key] = size, False
        self.now += Moment(size)
        weakref.finalize(storage, self._forget, key)
        if self.now.total > self.largest.get(self._part, Moment()).total:
            self.largest[self._part] = self.now

    def _forget(self, key: int) -> None:
        size, is_gradient = self._bytes.pop(key)
        self.now -= Moment(0, size) if is_gradient else Moment(size)

    def _on_gradient(self, param: Tensor) -> None:
        assert param.grad is not None
        key = param.grad.untyped_storage()._cdata
        size, was_gradient = self._bytes[key]
        if not was_gradient:
            self._bytes[key] = size, True
            self.now += Moment(-size, size)

    def _begins(self, part: str) -> Callable[[Any, Any, Any], None]:
        """A hook that notes when backward comes to a layer's output."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            (first, *_) = output if isinstance(output, tuple) else (output,)
            if first.requires_grad:
                first.register_hook(lambda _: self._enter(part))

        return hook

    def _enter(self, part: str) -> None:
        self._part = part
        if self.now.total > self.largest.get(part, Moment()).total:
            self.largest[part] = self.now
