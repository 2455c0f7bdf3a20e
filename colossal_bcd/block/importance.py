"""Norms of blocks, by which `switch_mode="importance"` draws them: the larger, the more often.  a: active blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.checks import require_choice
from colossal_bcd.block.schedule import Mode, Schedule
from colossal_bcd.optim.state.filed import FiledTensor
from colossal_bcd.sharding import square_sum

Norm = Literal["gradient", "weight"]


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """What is measured, and how far it decides.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    by: Norm = "gradient"
    """"gradient": root mean square, over the steps of a block's last period, of the norm of its averaged gradient, of
    which parameters whose gradients travel in low rank count with these; "weight": norm of the weights at the
    beginning of an epoch."""
    floor: float = 0.1
    """Share of the probability that is the same for all blocks; 1 is equal probabilities, and with 0 a block whose norm
    was once zero never comes back."""

    def __post_init__(self) -> None:
        require_choice("importance", self.by, ("gradient", "weight"))
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or not 0 <= self.floor <= 1:
            raise ValueError(f"importance_floor: got {self.floor!r}, expected a number from 0 to 1")

    @classmethod
    def asked(cls, mode: Mode, by: Norm, floor: float = 0.1) -> ImportanceOptions | None:
        """What `importance` and `importance_floor` of a BlockOptimizer ask for; None in other modes.

        Raises:
            ValueError: a value is wrong, or given in a mode that does not look at it.
        """
        options = cls(by=by, floor=floor)
        if mode == "importance":
            return options
        if options != cls():
            raise ValueError(
                f"importance: got {by!r} with importance_floor={floor} and switch_mode={mode!r}, expected "
                "switch_mode='importance', as other modes do not look at norms. Set it, or leave the others out."
            )
        return None


class Importance:
    """Norms that all ranks know alike; a `Contributor` to checkpoints.

    Attributes:
        norms: by block, when they were measured last; None: never, or no finite number.
        home: parameter of an active block on this rank -> position of the block among the active ones.
    """

    def __init__(self, options: ImportanceOptions, num_blocks: int) -> None:
        self.options = options
        self.norms: list[float | None] = [None] * num_blocks
        self.home: dict[Parameter, int] = {}
        self._active: tuple[int, ...] = ()
        self._squares: Tensor | None = None
        """[a] float64 sums over the steps of this period; stays on the device."""
        self._num_steps = 0

    @property
    def by_gradient(self) -> bool:
        """Whether every step has to say the norms of its gradients."""
        return self.options.by == "gradient"

    def begin(self, active: tuple[int, ...], members: Sequence[Collection[Parameter]]) -> None:
        """A period begins in which the blocks with these indices are active; `members` are theirs on this rank."""
        self._active, self._squares, self._num_steps = active, None, 0
        self.home = {param: place for place, params in enumerate(members) for param in params}

    def by_block(self, squares: Mapping[Parameter, Tensor], like: Tensor) -> Tensor:
        """[a] squared norms of the active blocks on this rank, on the device of `like`; zero where there is nothing."""
        parts: list[list[Tensor]] = [[] for _ in self._active]
        for param, square in squares.items():
            if param in self.home:
                parts[self.home[param]].append(square.reshape(()))
        # Added in an order that layouts give, so that ranks get the same bits.
        return torch.stack([torch.stack(part).sum().to(like) if part else like.new_zeros(()) for part in parts])

    def note(self, squares: Tensor) -> None:
        """Take [a] squared norms of an applied step's averaged gradients over all ranks, without the loss scale."""
        squares = squares.detach().to(torch.float64)
        self._squares = squares if self._squares is None else self._squares.to(squares.device) + squares
        self._num_steps += 1

    def note_local(self, tensors: Mapping[Parameter, Tensor]) -> None:
        """`note` on one process, of the gradients of these tensors, by active parameter; some may have none."""
        grads = {param: tensor.grad for param, tensor in tensors.items() if tensor.grad is not None}
        squares = {param: square_sum(grad.reshape(-1)).double() for param, grad in grads.items()}
        # On the gradients' device: a step does not wait for it.
        like = next(iter(squares.values()), torch.zeros((), dtype=torch.float64))
        self.note(self.by_block(squares, like))

    def end(self, schedule: Schedule, num_steps: int, weights: Callable[[list[int]], Tensor]) -> Schedule:
        """A period ends: note the norms, and draw the epochs that begin; the schedule from now on.

        Args:
            schedule: as it is.
            num_steps: applied steps.
            weights: squared norms of the weights of the blocks with these indices, over all ranks.
        """
        if self._squares is not None:
            for block, square in zip(self._active, self._squares.tolist(), strict=True):
                self.norms[block] = _norm(square / self._num_steps)
        begins = schedule.epochs_that_begin(num_steps)
        if not begins:
            return schedule
        if not self.by_gradient:
            blocks = [block for index in begins for block in range(*schedule.ranges[index])]
            for block, square in zip(blocks, weights(blocks).tolist(), strict=True):
                self.norms[block] = _norm(square)
        return schedule.draw(num_steps, self.norms, self.options.floor)

    def filed(self) -> Iterator[tuple[Parameter, dict[str, Any], Sequence[FiledTensor]]]:
        """See `Contributor`: there are none."""
        return iter(())

    def numbers(self) -> dict[str, Any]:
        """See `Contributor`."""
        squares = [] if self._squares is None else self._squares.tolist()
        return {"norms": list(self.norms), "squares": squares, "num_steps": self._num_steps}

    def load(self, numbers: Mapping[str, Any], saved: Mapping[Parameter, Sequence[str]]) -> None:
        """See `Contributor`."""
        self.norms, self._num_steps = list(numbers["norms"]), numbers["num_steps"]
        squares = numbers["squares"]
        self._squares = torch.tensor(squares, dtype=torch.float64) if squares else None


def squared_norms(blocks: Sequence[Sequence[Tensor]], device: torch.device | None = None) -> Tensor:
    """[number of blocks] float64 squared Euclidean norms of flat tensors; zero for a block without any."""
    none = torch.zeros((), dtype=torch.float64, device=device)
    sums = [[square_sum(part).sum().double() for part in parts] for parts in blocks]
    return torch.stack([torch.stack(parts).sum().to(none.device) if parts else none for parts in sums])


def _norm(square: float) -> float | None:
    return math.sqrt(square) if math.isfinite(square) else None
