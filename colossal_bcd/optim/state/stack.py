"""Parameters of equal layout that one rule updates at once.

A model has few layouts and many tensors, so most of a step's time would go into calls of small operations.  b: number
of members of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.optim.options import TRAINABLE
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.sharding import Layout, wide
from colossal_bcd.sharding.dtensor import is_dtensor

STACK_BYTES = 4 * 2**20
"""Bytes that a rule touches at once for a stack: they stay in a core's cache, and tensors that are larger gain nothing
from company."""
COPIES = 4
"""Tensors of a stack's size, in the dtype of its arithmetic, that are alive at once while its rule runs: the weights,
the gradient, the update and an intermediate result."""


@dataclass(eq=False)
class Member:
    """One parameter that takes part in a step; what is checked of it once stays so while it looks as it did."""

    param: Tensor
    layout: Layout
    hyper: Any
    key: int
    step: int
    """Number of this update of the parameter, from 1."""
    group: int
    num_steps: int
    """Steps that its param group has taken, where something random needs them."""
    spec: Mapping[str, StateSpec] | None = field(default=None, init=False)
    """Declared state, once it was asked for, under hyper-parameters that are these."""
    is_fused: bool | None = field(default=None, init=False)
    """Whether torch's fused kernel does the update, once it was asked for, under the same."""

    def __post_init__(self) -> None:
        param = self.param
        is_known = param.dtype in TRAINABLE and not is_dtensor(param)
        self._looks = (type(param), param.shape, param.dtype) if is_known else None

    def is_as_it_was(self, grad: Tensor) -> bool:
        """Whether what was checked when this was made holds for the parameter and its gradient now.

        Gradients of DTensors may be placed otherwise in each step.
        """
        param = self.param
        return self._looks == (type(param), param.shape, param.dtype) and not grad.is_sparse

    def count(self, hyper: Any, step: int, group: int, num_steps: int) -> Member:
        """Itself, in the next step."""
        if hyper is not self.hyper:
            self.hyper, self.spec, self.is_fused = hyper, None, None
        self.step, self.group, self.num_steps = step, group, num_steps
        return self


def stacks(
    members: Iterable[Member],
    num_bytes: int,
    kind_of: Callable[[Member], Hashable],
    specs_of: Callable[[Member], Mapping[str, StateSpec]],
) -> list[list[Member]]:
    """Members that can be updated together: equal in layout, param group, dtype, device and number of the update.

    The result follows from layouts, groups and which parameters have a gradient, so it is the same on every rank.
    Chunks of 8-bit state would reach over members: such parameters are alone.

    Args:
        members: in the order of the param groups.
        num_bytes: largest size of a stack with all its `COPIES`; a member that is larger is a stack of its own.
        kind_of: what else has to be equal; None for a member that is a stack of its own.
        specs_of: a member's declared state.
    """
    filling: dict[Any, tuple[list[Member], int]] = {}
    found: list[list[Member]] = []
    for member in members:
        param, own = member.param, kind_of(member)
        if own is None:
            found.append([member])
            continue
        kind = member.layout, member.group, param.dtype, param.device, member.step, member.num_steps, own
        stack, most = filling.get(kind) or ([], 0)
        if len(stack) >= most:
            if not most:
                size = max(member.layout.max_local, 1) * wide(param.dtype).itemsize * COPIES
                alone = any(spec.bits == 8 for spec in specs_of(member).values())
                most = 1 if alone else max(num_bytes // size, 1)
            stack = []
            filling[kind] = stack, most
            found.append(stack)
        stack.append(member)
    return found


class Stack:
    """Tensors of equal shape as one, without copies where they lie one after the other in one storage.

    Args:
        parts: the tensors.
        lead: whether `whole` has a leading dim; without it there is one part.

    Attributes:
        whole: [b, ...] or [...], contiguous; to be written in place.
    """

    def __init__(self, parts: Sequence[Tensor], lead: bool) -> None:
        self._parts = parts
        joined = _joined(parts)
        self._copied = joined is None
        whole = torch.stack([part.contiguous() for part in parts]) if joined is None else joined
        self.whole: Tensor = whole if lead else whole[0]

    @classmethod
    def of_state(cls, states: Sequence[dict[str, Any]], name: str, lead: bool) -> Stack:
        """Joins tensors of several parameters' state.

        Tensors with storages of their own, as after loading, move into a common one.  Of those that already share one
        with others, such as parameters without a gradient now, copies are made for this step.
        """
        parts = [state[name] for state in states]
        stack = cls(parts, lead)
        if stack._copied and all(part.untyped_storage().nbytes() == part.nbytes for part in parts):
            whole = stack.whole if lead else stack.whole.unsqueeze(0)
            for state, part in zip(states, whole.unbind(0), strict=True):
                state[name] = part
            stack._copied = False
        return stack

    def write_back(self) -> None:
        """Give the parts what was written into `whole`."""
        if self._copied:
            whole = self.whole if self.whole.dim() > self._parts[0].dim() else self.whole.unsqueeze(0)
            torch._foreach_copy_(list(self._parts), list(whole.unbind(0)))


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """[b, ...] view of contiguous tensors that follow one another in a storage; None where they do not."""
    first = parts[0]
    if not first.is_contiguous():
        return None
    if len(parts) == 1:
        return first.unsqueeze(0)
    size = first.numel()
    start, stride = first.data_ptr(), size * first.element_size()
    if any(part.data_ptr() != start + i * stride or not part.is_contiguous() for i, part in enumerate(parts)):
        return None
    if first.untyped_storage().data_ptr() != parts[-1].untyped_storage().data_ptr():
        return None
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()))
