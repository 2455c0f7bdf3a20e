"""Forward passes of a model that was never handed over, and the DDP around it, whose reducer is put to rest.

torch's DDP averages what required a gradient when it was made: of blocks, the first one.  Its `no_sync`, its process
group and its broadcasts of buffers go on to count.
"""

from __future__ import annotations

import dataclasses
import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

PLUGINS = "booster.boost with a plugin of colossal_bcd.booster"
_SHARDING = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP2", "DeepSpeedEngine": "DeepSpeed"}


class ForwardWatch(ABC):
    """Looks for the module that has what is trained, and then at its forward passes with gradients only.

    The outermost module that is called counts.  Until it is, a hook sees the calls of all modules; it goes with the
    watch, which hooks do not keep alive.
    """

    def __init__(self) -> None:
        self._watching: list[Any] = []
        self._wrappers: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self._inside: DistributedDataParallel | None = None
        self._resting: tuple[DistributedDataParallel, bool] | None = None
        self._wish = True
        me = weakref.ref(self)

        def look(module: nn.Module, args: Any) -> None:
            watch = me()
            if watch is None:
                search.remove()
            elif torch.is_grad_enabled() and not in_backward():
                watch._consider(module)

        search = register_module_forward_pre_hook(look)
        self._watching.append(search)

    @abstractmethod
    def trained(self) -> Collection[Parameter]:
        """What is active, by which the model is found."""

    @abstractmethod
    def found_group(self, group: dist.ProcessGroup) -> None:
        """Take the processes over which the model's DDP averages."""

    @abstractmethod
    def forward_begins(self) -> None:
        """A forward pass of the model, with gradients, begins."""

    @abstractmethod
    def forward_ends(self, outputs: list[Tensor], *, synced: bool, fruitless: bool) -> None:
        """It ends.

        Args:
            outputs: tensors with a gradient that the model returned.
            synced: whether gradients of this pass are to be averaged; not under `no_sync`.
            fruitless: whether there will be no gradients of it though it is a pass of training.
        """

    def stop_watching(self) -> None:
        """Look no more, and let the DDP go on as it was."""
        self.wake()
        for handle in self._watching:
            handle.remove()
        self._watching = []

    def wake(self) -> None:
        """Give the DDP its settings back."""
        if self._resting is not None:
            wrapper, wish = self._resting
            wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = wish
            self._resting = None

    def _consider(self, module: nn.Module) -> None:
        if not self._watching:
            return
        if not _holds(module, self.trained()):
            if module.training:
                _refuse_sharding(module)
            return
        _refuse_sharding(module)
        self._watching.pop().remove()
        for each in module.modules():
            if isinstance(each, DistributedDataParallel) and _holds(each, self.trained()):
                self._attach(each)
        root = module
        if isinstance(module, DistributedDataParallel):
            root = module.module
            self._rest(module)
        self._watching += [
            root.register_forward_pre_hook(_weakly(self._begin)),
            root.register_forward_hook(_weakly(self._end)),
        ]
        if root is module:
            self._begin(root)

    def _attach(self, wrapper: DistributedDataParallel) -> None:
        _refuse_options(wrapper)
        self.found_group(wrapper.process_group)
        self._wrappers.add(wrapper)
        self._watching += [
            wrapper.register_forward_pre_hook(_weakly(self._rest)),
            wrapper.register_forward_hook(_weakly(self._leave), always_call=True),
        ]

    def _rest(self, wrapper: Any, *_: Any) -> None:
        """Before a forward pass of the DDP, which prepares its reducer for backward if it is to synchronise."""
        if not torch.is_grad_enabled() or in_backward():
            return
        self.wake()
        if wrapper._join_config.enable:
            raise ValueError(
                "DistributedDataParallel.join (accelerate's join_uneven_inputs): got it with blocks, expected as many "
                "batches on every process, as this package averages gradients itself. Drop the last batches of a "
                "loader that has more."
            )
        self._wish = wrapper.require_backward_grad_sync
        self._inside, self._resting = wrapper, (wrapper, self._wish)
        wrapper.require_backward_grad_sync = False

    def _leave(self, *_: Any) -> None:
        self._inside = None
        self.wake()

    def _begin(self, *_: Any) -> None:
        if not torch.is_grad_enabled() or in_backward():
            return
        active = DistributedDataParallel._get_active_ddp_module()
        if active is not None and active not in self._wrappers:
            self._attach(active)
            self._rest(active)
        elif self._inside is None:
            self._wish = True
        self.forward_begins()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not in_backward():
            found = list(_tensors(output))
            outputs = [tensor for tensor in found if tensor.requires_grad]
            # What is not seen in an object of some other class may have a gradient.
            fruitless = bool(found) and not outputs and module.training and _holds(module, self.trained())
            self.forward_ends(outputs, synced=self._wish, fruitless=fruitless)


def in_backward() -> bool:
    """Whether this thread runs a backward pass, in which gradient checkpointing calls modules again."""
    return torch._C._current_graph_task_id() != -1


def _weakly(method: Any) -> Any:
    """The method as a hook of a module, which must not keep its object alive."""
    weak = weakref.WeakMethod(method)

    def hook(*args: Any) -> None:
        bound = weak()
        if bound is not None:
            bound(*args)

    return hook


def _holds(module: nn.Module, params: Collection[Parameter]) -> bool:
    return any(param in params for param in module.parameters())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple, set)):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))


def _refuse_sharding(model: nn.Module) -> None:
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _SHARDING and kind.__module__.startswith(("torch.", "deepspeed.")):
                name = _SHARDING[kind.__name__]
                attach = "Call colossal_bcd.fsdp.attach(model, optimizer), use" if name == "FSDP2" else "Use"
                raise ValueError(
                    f"BlockOptimizer: the model is in a {kind.__name__}, expected whole weights on every process: "
                    f"{name} shards them, or their gradients. {attach} torch's DDP, or {PLUGINS}, which shards what "
                    "trains."
                )


def _refuse_options(wrapper: Any) -> None:
    """Refuse what configures the reducer of a DDP, which is not used."""
    given = {
        "static_graph=True": wrapper.static_graph,
        "mixed_precision": wrapper.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(wrapper._delay_all_reduce_params),
        "a communication hook": bool(wrapper._comm_hooks),
    }
    asked = [name for name, is_given in given.items() if is_given]
    if asked:
        raise ValueError(
            f"DistributedDataParallel with {asked[0]}: it configures DDP's reducer, which is not used with blocks, as "
            "it averages a fixed set of parameters; expected none of "
            f"{', '.join(given)}. Leave it out: this package averages the gradients of what is active."
        )
