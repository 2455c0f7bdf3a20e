"""Names of torch's FSDP2 that are not public, or not in one place in all versions: the only file that has them.

Each private name is asked for by `private`, so that a torch without it says which one is missing and what for.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from colossal_bcd.engine.failures import says_where
from colossal_bcd.sharding.dtensor import local_values

try:
    from torch.distributed.fsdp import (  # type: ignore[attr-defined]
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
    )
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import (  # type: ignore[attr-defined]
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
    )

__all__ = ["CPUOffloadPolicy", "FSDPModule", "MixedPrecisionPolicy", "fully_shard"]

VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
"""Of torch: major, minor."""
_FOLDER = "torch.distributed._composable.fsdp" if VERSION < (2, 6) else "torch.distributed.fsdp._fully_shard"


def private(owner: Any, name: str, purpose: str) -> Any:
    """An attribute that torch does not promise to keep.

    Args:
        owner: module, class or object.
        name: of the attribute.
        purpose: what needs it, for the error.
    Raises:
        RuntimeError: this torch has no such attribute.
    """
    if hasattr(owner, name):
        return getattr(owner, name)
    where = getattr(owner, "__name__", type(owner).__name__)
    raise RuntimeError(
        f"torch {torch.__version__} has no {where}.{name}, which {purpose} needs. Use torch 2.5 or 2.13, with which "
        "this package is tested."
    )


def module_of_fsdp(name: str) -> ModuleType:
    """A module of torch's FSDP2, such as "_fsdp_collectives"."""
    return importlib.import_module(f"{_FOLDER}.{name}")


def replace_torch(stand_in: Any) -> None:
    """Let the modules of FSDP2 in torch 2.5, which name `torch.cuda` for whatever device, see another `torch`.

    Args:
        stand_in: has all of torch's names.
    """
    for name in ("_fsdp_param_group", "_fsdp_collectives", "_fsdp_state"):
        module = module_of_fsdp(name)
        private(module, "torch", "FSDP2 on CPUs")
        module.torch = stand_in  # type: ignore[attr-defined]


def preserve_versions() -> None:
    """Let torch 2.5 gather weights on CPUs without counting that as an in-place write, on which backward would fail."""
    module = module_of_fsdp("_fsdp_param_group")
    original = private(module, "foreach_all_gather_copy_out", "FSDP2 on CPUs")
    preserving = private(torch.autograd, "_unsafe_preserve_version_counter", "FSDP2 on CPUs")

    def copy_out(result: Any, fsdp_params: list[Any], group: dist.ProcessGroup) -> None:
        with contextlib.ExitStack() as stack:
            for param in fsdp_params:
                for output in private(param, "all_gather_outputs", "FSDP2 on CPUs"):
                    stack.enter_context(preserving(output))
            original(result, fsdp_params, group)

    module.foreach_all_gather_copy_out = copy_out  # type: ignore[attr-defined]


def divide_sums() -> None:
    """Let torch 2.5 divide sums of gradients where it asks for an average, of which its gloo makes a sum silently."""
    module = module_of_fsdp("_fsdp_collectives")
    original = private(module, "_get_gradient_divide_factors", "FSDP2 on CPUs")

    def divisors(scattered: dist.ProcessGroup, reduced: dist.ProcessGroup | None, dtype: torch.dtype) -> Any:
        found = original(scattered, reduced, dtype)
        if found != (None, None):
            return found
        return 1.0, float(scattered.size() * (1 if reduced is None else reduced.size()))

    module._get_gradient_divide_factors = divisors  # type: ignore[attr-defined]


_OF_GROUPS = (
    "fsdp_params", "device", "post_forward", "post_backward", "unshard", "wait_for_unshard", "is_sharded",
    "reduce_grads", "all_reduce_grads", "_training_state", "_all_gather_result", "_partial_reduce_output",
    "_init_mp_dtypes", "mp_policy", "mesh_info", "post_forward_mesh_info",
)  # fmt: skip

OF_PARAMS = ("sharded_param", "offload_to_cpu", "pin_memory", "_sharded_param_data", "unsharded_accumulated_grad")
"""Attributes of each parameter of a group; `_unsharded_param` is there once it was gathered."""
_BLOCKS = "block coordinate descent"


class ShardGroup:
    """Parameters that FSDP2 gathers together, and whose gradients it reduces together.

    It copies `requires_grad` of its sharded parameters whenever it gathers, so that freezing these freezes the group.

    Args:
        module: whose `fully_shard` made it.
        group: torch's own.
    """

    def __init__(self, module: nn.Module, group: Any) -> None:
        for name in _OF_GROUPS:
            private(group, name, _BLOCKS)
        for each in group.fsdp_params:
            for name in OF_PARAMS:
                private(each, name, _BLOCKS)
        self.module, self._group = module, group
        self.late = False
        """Whether the last backward pass kept its gradients back for the next one."""
        self.absent: set[Parameter] = set()
        """Parameters whose gradient on this rank since `begin` is zeros in the place of none."""
        self._reached: set[Parameter] = set()

    @property
    def params(self) -> list[Parameter]:
        """The sharded parameters that are in the model now."""
        return [each.sharded_param for each in self._group.fsdp_params]

    @property
    def device(self) -> torch.device:
        """Where it communicates and computes."""
        device: torch.device = self._group.device
        return device

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """In which gradients travel; None: their own."""
        dtype: torch.dtype | None = self._group.mp_policy.reduce_dtype
        return dtype

    @property
    def num_shards(self) -> int:
        """Ranks that share its weights."""
        return int(self._group.mesh_info.shard_mesh_size)

    @property
    def kept_over(self) -> int:
        """Ranks over which its weights stay divided from forward to backward; 1: they stay whole."""
        kept = self._group.post_forward_mesh_info
        return 1 if kept is None else int(kept.shard_mesh_size)

    @property
    def copies_late(self) -> bool:
        """Whether gradients are copied to pinned memory while backward goes on, without waiting for hooks."""
        return VERSION < (2, 13) and any(each.offload_to_cpu and each.pin_memory for each in self._group.fsdp_params)

    def stores(self, param: Parameter) -> bool:
        """Whether the values that it will gather are those of the parameter."""
        each = next((each for each in self._group.fsdp_params if each.sharded_param is param), None)
        if each is None:
            return False
        gathered = each._sharded_param_data.untyped_storage().data_ptr()
        return bool(gathered == local_values(param).untyped_storage().data_ptr())

    def begin(self) -> None:
        """A step has used the gradients up, or they are forgotten; so are those that were kept back."""
        self.late, self.absent, self._reached = False, set(), set()
        for each in self._group.fsdp_params:
            each.unsharded_accumulated_grad = None
        self._group._partial_reduce_output = None

    def renew(self) -> None:
        """Look again at what trains: torch 2.13 takes the dtypes of gradients from that, once, at the first forward."""
        self._group._init_mp_dtypes()

    def forget_prefetched(self) -> None:
        """Drop a gather that backward did not come to: torch 2.5 would compute with its weights in the next forward."""
        result = self._group._all_gather_result
        if result is None:
            return
        if result.all_gather_work is not None:
            result.all_gather_work.wait()
        if result.all_gather_event is not None and self.device.type != "cpu":
            torch.get_device_module(self.device).current_stream().wait_event(result.all_gather_event)
        self._group._all_gather_result = None

    def reshard(self) -> None:
        """Free the gathered weights, which a step has made stale."""
        if not self._group.is_sharded:
            self.module.reshard()

    def end_prefetch(self) -> Callable[[], None]:
        """Let backward gather nothing ahead from here on; the result undoes that."""
        state = private(self.module, "_get_fsdp_state", _BLOCKS)()
        before = private(state, "_states_to_backward_prefetch", _BLOCKS)
        # What is gathered already is not gathered again.
        self.module.set_modules_to_backward_prefetch([self.module])

        def undo() -> None:
            state._states_to_backward_prefetch = before

        return undo

    def watch(self, keep_back: Callable[[Collection[Parameter]], None]) -> None:
        """Note which gradients come, give zeros for those that do not, and say where ranks are lost.

        Ranks reduce the gradients that they have, and would reduce different ones where a batch uses fewer weights.
        Weights that no backward pass will free are freed after a forward pass: users would write into gathered ones,
        which nobody reads back.

        Args:
            keep_back: called with the parameters whose gradients a pass does not reduce.
        """
        group = self._group
        reduce = says_where("average of gradients")(group.post_backward)
        group.unshard = says_where("gather of weights")(group.unshard)
        group.wait_for_unshard = says_where("gather of weights")(group.wait_for_unshard)
        end_forward = group.post_forward

        def post_forward(*given: Any) -> Any:
            output = end_forward(*given)
            if not torch.is_grad_enabled():
                self.reshard()
            return output

        def post_backward(*unused: Any) -> None:
            # Called again at the end of all, where nothing new has come.
            if group._training_state.name == "PRE_BACKWARD":
                here = self._note()
                self.late = not group.reduce_grads or not group.all_reduce_grads
                if not group.reduce_grads:
                    keep_back(here)
            reduce(*unused)

        group.post_forward, group.post_backward = post_forward, post_backward

    def _note(self) -> list[Parameter]:
        """Parameters with a gradient in this pass; the others get zeros if the pass reduces them."""
        trained = [each for each in self._group.fsdp_params if each.sharded_param.requires_grad]
        whole = {each: private(each, "_unsharded_param", _BLOCKS) for each in trained}
        here = [each.sharded_param for each in trained if whole[each].grad is not None]
        kept = [each for each in trained if each.unsharded_accumulated_grad is not None]
        self._reached.update(here)
        self.absent.difference_update(here)
        if self._group.reduce_grads:
            for each in trained:
                if whole[each].grad is None and each not in kept:
                    if each.sharded_param not in self._reached:
                        self.absent.add(each.sharded_param)
                    zeros = torch.zeros_like(whole[each], requires_grad=False)
                    if kept:  # in the dtype of the reduction
                        each.unsharded_accumulated_grad = zeros.to(kept[0].unsharded_accumulated_grad.dtype)
                    else:
                        whole[each].grad = zeros
        return here


def shard_groups(model: nn.Module) -> Iterator[ShardGroup]:
    """The groups of FSDP2 in a model, in its order."""
    seen = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = private(module, "_get_fsdp_state", _BLOCKS)()
        one = getattr(state, "_fsdp_param_group", None)
        for group in getattr(state, "_fsdp_param_groups", [] if one is None else [one]):
            if id(group) not in seen:
                seen.add(id(group))
                yield ShardGroup(module, group)
