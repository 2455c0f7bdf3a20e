"""What an optimizer says of its training when it is asked; a step computes and keeps nothing for it unless recorded.

    with optimizer.recording():    hooks of torch around the step:
        optimizer.step()               before   copies the weights that train, begins to count what is sent
                                       after    sums of squares, in one all-reduce for each axis of the mesh
    optimizer.metrics()            norms of the weights as they are, and what was recorded

Sums are over the ranks that have parts of a parameter, so all of these must record, and ask, alike.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colossal_bcd.optim.state.stack import Member
from colossal_bcd.optim.state.storage import StoredState
from colossal_bcd.sharding import Layout, Mesh, ShardView, Sum, resolve, sum_of_squares, wide
from colossal_bcd.sharding.dtensor import local_values


class Watched(NamedTuple):
    """A tensor that an optimizer updates."""

    name: str
    tensor: Tensor
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """A recorded step; every dict is by the names of the parameters that took part in it."""

    blocks: tuple[str, ...] = ()
    """Names of the blocks that it trained; none of an optimizer that trains all."""
    gradient_norms: Mapping[str, float]
    """Euclidean norms of whole gradients as the update took them: averaged, and clipped by a plugin or before the step.
    Missing are those of which an engine averaged a low-rank gradient, or a share, alone."""
    update_rms: Mapping[str, float]
    """Root mean square of what the step changed a weight by (under an engine its master), decay and rounding included.
    Missing where an engine applies low-rank updates itself (`LowRankOptions(gather=True)`)."""
    trust_ratios: Mapping[str, float]
    """LAMB's, of its moments as they are stored; of others there are none."""
    sizes: Mapping[str, int]
    """Values of each whole parameter."""
    bytes_sent: int
    """Payload of the update's collectives on this rank, without the gradients and weights that plugins exchange, which
    `colossal_bcd.testing.CollectiveCounter` counts, too."""

    @property
    def gradient_norm(self) -> float:
        """Euclidean norm of all `gradient_norms` together."""
        return math.hypot(*self.gradient_norms.values())

    @property
    def total_update_rms(self) -> float:
        """Root mean square of all updates together."""
        squares = math.fsum(self.sizes[name] * rms**2 for name, rms in self.update_rms.items())
        return math.sqrt(squares / max(sum(self.sizes[name] for name in self.update_rms), 1))


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What trains now, of this pipeline stage; every dict is by the names of parameters."""

    blocks: tuple[str, ...] = ()
    """Names of the active blocks; none of an optimizer that trains all."""
    weight_norms: Mapping[str, float] = field(default_factory=dict)
    """Euclidean norms of the whole weights (under an engine of their masters)."""
    projection_energy: Mapping[str, float] = field(default_factory=dict)
    """Part of a gradient that a projector keeps, in [0, 1], at its last refresh (see `GaLore.captured_energy`)."""
    step: StepMetrics | None = None
    """The last step within `recording()`; None where there was none."""

    @property
    def weight_norm(self) -> float:
        """Euclidean norm of what trains now."""
        return math.hypot(*self.weight_norms.values())

    def scalars(self) -> dict[str, float]:
        """Totals, means and extremes by name, for `SummaryWriter.add_scalar` and the like; only what is known."""
        found = {"weight_norm": self.weight_norm}
        if self.projection_energy:
            found["projection_energy/mean"] = statistics.fmean(self.projection_energy.values())
            found["projection_energy/min"] = min(self.projection_energy.values())
        if self.step is not None:
            found["bytes_sent"] = self.step.bytes_sent
            if self.step.gradient_norms:
                found["gradient_norm"] = self.step.gradient_norm
            if self.step.update_rms:
                found["update_rms"] = self.step.total_update_rms
            if self.step.trust_ratios:
                ratios = self.step.trust_ratios.values()
                found["trust_ratio/min"], found["trust_ratio/max"] = min(ratios), max(ratios)
                found["trust_ratio/median"] = statistics.median(ratios)
        return found


class Metered:
    """Base of optimizers that can be asked for metrics."""

    recorded: Callable[[], StepMetrics] | None = None
    """Reads the last recorded step."""

    def watched(self) -> list[Watched]:
        """The tensors that a step may update now."""
        optimizer: Any = self
        found = []
        for group in optimizer.param_groups:
            params, names = group["params"], group.get("param_names", ())
            if len(names) != len(params):
                names = [str(optimizer.key_of(param)) for param in params]
            found += [Watched(*each, optimizer.layout_of(each[1])) for each in zip(names, params, strict=True)]
        return found

    def updating(self) -> Any:
        """The optimizer that updates what is `watched`."""
        return self

    def active_block_names(self) -> tuple[str, ...]:
        """Names of the blocks that train now; none of an optimizer that trains all."""
        return ()

    def gradient_of(self, param: Tensor) -> Tensor | None:
        """The whole gradient that a step takes of a tensor, if there is one."""
        return self._grad(param)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the steps that are made within; `metrics()` then has the last one of them.

        A recorded step trains the same.  It keeps a copy of this rank's part of the weights that train meanwhile, and
        makes one more collective for each axis of the mesh, so all ranks must record the same steps.

        Raises:
            ValueError: an optimizer that is not this package's updates parts of parameters.
        """
        self.watched()  # raises before the step
        self.recorded = None
        recorder, optimizer = _Recorder(self), self.updating()
        handles = [
            optimizer.register_step_pre_hook(recorder.before),
            optimizer.register_step_post_hook(recorder.after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            recorder.stop_counting()

    @torch.no_grad()
    def metrics(self) -> Metrics:
        """What trains now, and the last recorded step.

        Costs nothing unless called.  Waits for the device, and makes one collective for each axis of the mesh: all
        ranks must call it.

        Raises:
            ValueError: an optimizer that is not this package's updates parts of parameters.
        """
        watched, optimizer = self.watched(), self.updating()
        squares = resolve([sum_of_squares(_data(*each[1:]), each.layout.axes) for each in watched], _mesh(optimizer))
        names = {each.tensor: each.name for each in watched}
        energies = optimizer.captured_energy() if hasattr(optimizer, "captured_energy") else {}
        return Metrics(
            blocks=self.active_block_names(),
            weight_norms={each.name: math.sqrt(x) for each, x in zip(watched, _numbers(squares), strict=True)},
            projection_energy={names[param]: energy for param, energy in energies.items() if param in names},
            step=None if self.recorded is None else self.recorded(),
        )


class _Recorder:
    """The hooks around a step."""

    def __init__(self, metered: Metered) -> None:
        self._metered = metered
        self._weights: dict[Tensor, Tensor] = {}
        self._given: set[Tensor] = set()
        self._counted: Any = None
        self._sent = 0

    def before(self, *_: Any) -> None:
        """Copy weights, note of which there are low-rank gradients alone, and count what is sent from now on."""
        self.stop_counting()
        optimizer = self._metered.updating()
        for each in self._metered.watched():
            self._weights[each.tensor] = _data(each.tensor, each.layout).clone()
            if hasattr(optimizer, "has_low_rank") and optimizer.has_low_rank(optimizer.key_of(each.tensor)):
                self._given.add(each.tensor)
        self._sent, self._counted = 0, _mesh(optimizer)
        reduce, exchange = self._counted.begin_all_reduce, self._counted.all_to_all

        def begin_all_reduce(tensor: Tensor, *how: Any) -> Any:
            self._sent += tensor.nbytes
            return reduce(tensor, *how)

        def all_to_all(tensor: Tensor, *how: Any) -> Any:
            self._sent += tensor.nbytes
            return exchange(tensor, *how)

        self._counted.begin_all_reduce, self._counted.all_to_all = begin_all_reduce, all_to_all

    def stop_counting(self) -> None:
        """Leave the mesh as it was, and forget what a step that raised has left."""
        self._weights, self._given = {}, set()
        if self._counted is not None:
            del self._counted.begin_all_reduce, self._counted.all_to_all
            self._counted = None

    @torch.no_grad()
    def after(self, *_: Any) -> None:
        """Sum up what the step has done, over all ranks; the device is not waited for."""
        optimizer, weights, given = self._metered.updating(), self._weights, self._given
        self.stop_counting()
        groups = {param: group for group in optimizer.param_groups for param in group["params"]}
        later: Collection[int] = getattr(optimizer, "replicated_updates", None) or ()
        watched = self._metered.watched()
        sums, missing = list[Sum](), [set[str](), set[str](), set[str]()]
        for each in watched:
            before = weights.pop(each.tensor)
            wide_before, grad = before.to(wide(before.dtype)), _gradient(optimizer, each.tensor)
            parts = (
                None if grad is None or each.tensor in given else _data(grad, each.layout),
                None
                if later and optimizer.key_of(each.tensor) in later
                else _data(each.tensor, each.layout) - wide_before,
                None if grad is None else _direction(optimizer, each, wide_before, groups[each.tensor]),
            )
            for part, names in zip(parts, missing, strict=True):
                if part is None:
                    names.add(each.name)
                # The same on every rank, whatever it has.
                sums.append(sum_of_squares(wide_before.new_zeros(1) if part is None else part, each.layout.axes))
            sums.append(sum_of_squares(wide_before, each.layout.axes))
        squares = resolve(sums, _mesh(optimizer))
        sizes = {each.name: each.layout.numel for each in watched}
        blocks, sent = self._metered.active_block_names(), self._sent
        self._metered.recorded = lambda: _read(squares, sizes, missing, blocks, sent)


def _read(
    squares: Sequence[Tensor],
    sizes: dict[str, int],
    missing: Sequence[Collection[str]],
    blocks: tuple[str, ...],
    sent: int,
) -> StepMetrics:
    """A recorded step: of every parameter four squares, of which the first three may be missing."""
    norms = iter(math.sqrt(square) for square in _numbers(squares))
    rows = {name: tuple(next(norms) for _ in range(4)) for name in sizes}
    return StepMetrics(
        blocks=blocks,
        gradient_norms={name: row[0] for name, row in rows.items() if name not in missing[0]},
        update_rms={
            name: row[1] / math.sqrt(max(sizes[name], 1)) for name, row in rows.items() if name not in missing[1]
        },
        trust_ratios={
            name: row[3] / row[2] if row[2] and row[3] else 1.0 for name, row in rows.items() if name not in missing[2]
        },
        sizes=sizes,
        bytes_sent=sent,
    )


def _mesh(optimizer: Any) -> Mesh:
    mesh: Mesh | None = getattr(optimizer, "mesh", None)
    return Mesh() if mesh is None else mesh


def _data(tensor: Tensor, layout: Layout) -> Tensor:
    """[n] values of data on this rank."""
    return local_values(tensor).reshape(-1)[: layout.num_local]


def _gradient(optimizer: Any, tensor: Tensor) -> Tensor | None:
    grad: Tensor | None = optimizer.gradient_of(tensor) if isinstance(optimizer, Metered) else tensor.grad
    return grad


def _direction(optimizer: Any, each: Watched, weight: Tensor, group: dict[str, Any]) -> Tensor | None:
    """[n] what a trust ratio compares a weight with, from the moments after the update; None: there is no ratio."""
    state = optimizer.state.get(each.tensor)
    if not hasattr(optimizer, "trust_direction") or not state:
        return None
    hyper, key = optimizer.hyper_of(group), optimizer.key_of(each.tensor)
    member = Member(each.tensor, each.layout, hyper, key, state["step"], 0, 0)
    stored = StoredState([member], [state], optimizer.state_spec(each.layout, hyper), False)
    direction: Tensor = optimizer.trust_direction(weight, stored.seen(ShardView(each.layout, weight, weight)), hyper)
    return direction


def _numbers(values: Sequence[Tensor]) -> list[float]:
    """Read tensors of one value, waiting for the device once."""
    return torch.cat([value.reshape(1).to(values[0]) for value in values]).tolist() if values else []
