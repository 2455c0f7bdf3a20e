"""GaLore (Zhao et al., arXiv 2403.03507) and GoLore (He et al., arXiv 2410.11289): the transformation of a rule.

    gradient [R, C] -> low-rank gradient -> the rule of AdamW, SGD, Adafactor, ... -> low-rank step -> weight [R, C]
              project                                                          project back

Rounds between refreshes, besides the inner rule's own: one that completes boundary rows (right), or sums a strip
(left), and one that spreads their update; none where rows and columns are whole on the rank.  A refresh adds two: the
gradient to its owner, the bases back.  `low_rank.optimizers` has the optimizers that are made of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping
from dataclasses import make_dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.low_rank.projection import Projection, is_projected, low_rank_layout, rank_of
from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer, ReplicatedUpdate
from colossal_bcd.low_rank.refresh import BASES, refresh
from colossal_bcd.low_rank.refresh_schedule import (
    REFRESH_AT,
    REFRESH_STABLE,
    REFRESH_WAIT,
    Matrix,
    RefreshTurn,
    is_due,
    lazy_spec,
    offsets,
    owners,
    settle,
)
from colossal_bcd.optim.base import Params
from colossal_bcd.optim.options import Storage, flat_options, members_with_names, require
from colossal_bcd.optim.state.spec import Shaped, State, StateSpec
from colossal_bcd.optim.state.stack import Member
from colossal_bcd.sharding import (
    WAVE_BYTES,
    Layout,
    LowRank,
    LowRankGradient,
    LowRankView,
    Mesh,
    Request,
    Rounds,
    ShardView,
    Sum,
    View,
)

logger = logging.getLogger(__name__)


class GaLore(ReducedGradientOptimizer):
    """Applies the rule of the next base class to low-rank projections of the gradients, on any mesh.

    `class GaLoreSGD(GaLore, SGD)` is all that GaLore with SGD needs: its hyper-parameters are SGD's and `Projection`'s.
    The global matrix is projected, whatever part of it a rank has.  Right projections keep the rule's state of the rows
    that begin on the rank's slice, left ones of the rank's share of the columns; the bases are whole on every rank.
    Tensors of fewer than two dims, and groups without a rank, are not projected: the rule sees them as they are.

    Args:
        params: parameters, or param groups as plain dicts; only groups with a `rank` are projected.
        values: hyper-parameters of the rule, in order.
        projection: how gradients are projected, in place of the flat keys of `Projection`.
        storage: as of `ShardedOptimizer`.
        wave_bytes: as of `ShardedOptimizer`.
        compile: as of `ShardedOptimizer`.
        flat: hyper-parameters of every group by their keys in a param group.
    Raises:
        TypeError: an argument is no hyper-parameter of this optimizer, or is given twice.
        ValueError: a hyper-parameter is out of range, the rank is larger than a side of a matrix, or no group has one.
    """

    temporary_bytes = 4

    def __init_subclass__(cls, **kwargs: Any) -> None:
        inner = getattr(cls, "hyper_type", None)
        if inner is not None and not issubclass(inner, Projection):
            module = {"__module__": cls.__module__}
            bases = (Projection, inner)
            cls.hyper_type = make_dataclass(f"{cls.__name__}Hyper", [], bases=bases, frozen=True, namespace=module)
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        params: Params,
        *values: Any,
        projection: Projection | None = None,
        storage: Storage | None = None,
        wave_bytes: int = WAVE_BYTES,
        compile: bool | None = None,
        **flat: Any,
    ) -> None:
        # All projected parameters of which this optimizer was ever told, by key: inactive blocks and other pipeline
        # stages included, so that every rank and mesh makes the same schedule.
        self._matrices: dict[int, Matrix] = {}
        self._turns: dict[int, RefreshTurn] | None = None
        self._reports: dict[int, Tensor] = {}
        self._energies: dict[Tensor, Tensor] = {}
        name = type(self).__name__
        flat.update(flat_options(name, "projection", projection, flat))
        super().__init__(params, *values, storage=storage, wave_bytes=wave_bytes, compile=compile, **flat)
        # Not what the groups have: slices of matrices, which `bind` will say what they are, are flat.
        if all(group["rank"] is None for group in self.param_groups):
            count = sum(len(group["params"]) for group in self.param_groups)
            raise ValueError(
                f"{name}: no param group has a rank, so none of the {count} parameters is projected, "
                "expected at least one. Put matrices into a group with rank=..., as colossal_bcd.param_groups(model, "
                "rank=...) does, or use an optimizer without GaLore."
            )

    def update(self, view: View, state: State, hyper: Any) -> Rounds:
        rule: Any = super().update  # type: ignore[safe-super]
        if is_projected(view.weight.layout, hyper):
            return self._projected(rule, view.weight, state, hyper)
        made: Rounds = rule(view, state, hyper)
        return made

    @property
    def rule_name(self) -> str:
        rule: Any = super().update  # type: ignore[safe-super]
        return f"GaLore{rule.__qualname__.split('.')[-2]}"

    def _projected(self, rule: Any, view: ShardView, state: State, hyper: Any) -> Rounds:
        """The update of projected parameters (arXiv 2403.03507, algorithm 2)."""
        low_rank, turn = low_rank_layout(view.layout, hyper), self.turn(view.keys[0])
        if is_due(state.step - 1, state.numbers, hyper, turn.offset):
            yield from refresh(view, state, hyper, low_rank, turn, self.momentum_entry, hyper.seed)
        bases = state.get("left"), state.get("right")
        given = [gradient for key in view.keys if (gradient := self.take_low_rank(key)) is not None]
        request: Request
        if given:
            request = Sum(torch.stack(given).view(*view.lead, *low_rank.local_shape), ())
        else:
            request = low_rank.project(view.stored_grad, *bases)
        (gradient,) = yield (request,)
        record = None if self.replicated_updates is None else partial(self._record, view, low_rank, bases, hyper.scale)
        yield from rule(LowRankView(view, low_rank, bases, gradient, hyper.scale, record), state, hyper)

    def _record(
        self,
        view: ShardView,
        low_rank: LowRank,
        bases: tuple[Tensor | None, Tensor | None],
        scale: float,
        step: Tensor,
        decay: float | Tensor,
        decay_first: bool,
    ) -> None:
        """Keep the updates of a stack for the engine that applies them."""
        assert self.replicated_updates is not None
        count, layout, side, rank = len(view.keys), low_rank.layout, low_rank.side, low_rank.rank
        steps = step.view(count, *low_rank.local_shape)
        for index, key in enumerate(view.keys):
            left, right = (None if basis is None else basis.view(count, *basis.shape[-2:])[index] for basis in bases)
            wanted = LowRankGradient(layout=layout, side=side, rank=rank, left=left, right=right)
            own = decay.view(count, -1)[index] if isinstance(decay, Tensor) else decay
            self.replicated_updates[key] = ReplicatedUpdate(wanted, steps[index], scale, own, decay_first)

    def state_spec(self, layout: Shaped, hyper: Any) -> dict[str, StateSpec]:
        spec_of = super().state_spec  # type: ignore[safe-super]
        if isinstance(layout, LowRank) or not is_projected(layout, hyper):
            return spec_of(layout, hyper)  # type: ignore[arg-type]
        low_rank = low_rank_layout(layout, hyper)
        spec = {**spec_of(low_rank, hyper), **lazy_spec(hyper)}  # type: ignore[arg-type]
        rows, columns = low_rank.layout.shape
        if low_rank.side != "right":
            spec["left"] = StateSpec(kind="replicated", shape=(rows, low_rank.rank))
        if low_rank.side != "left":
            spec["right"] = StateSpec(kind="replicated", shape=(columns, low_rank.rank))
        return spec

    def stack_kind(self, member: Member) -> Hashable:
        if not is_projected(member.layout, member.hyper):
            return super().stack_kind(member)
        state = self.state.get(member.param) or {}
        # A refresh is a matrix's own: it has an owner and a seed.
        if is_due(member.step - 1, state, member.hyper, self.turn(member.key).offset):
            return None
        return self.has_low_rank(member.key)

    def wants_low_rank(self, layout: Layout, state: Mapping[str, Any], hyper: Any, key: int) -> LowRankGradient | None:
        if not is_projected(layout, hyper) or self.refresh_due(state, hyper, key):
            return None
        low_rank = low_rank_layout(layout, hyper)
        left, right = (state.get(name) for name in BASES)
        return LowRankGradient(layout=low_rank.layout, side=low_rank.side, rank=low_rank.rank, left=left, right=right)

    def refresh_due(self, state: Mapping[str, Any], hyper: Projection, key: int) -> bool:
        """Whether the update numbered `state["step"]` refreshes the bases, so that it needs the whole gradient.

        Engines ask before the gradient is there.  The answer follows from what is alike on all ranks that have a part
        of the parameter: hyper-parameters, keys, and plain numbers of the state, the lazy ones of which were read from
        the owner's report.  Replicas agree as long as they compute the same bases from the same gradients.

        Args:
            state: of the parameter, with the number of the update in question, from 1.
            hyper: of its group.
            key: the parameter's number.
        """
        return is_due(state["step"] - 1, state, hyper, self.turn(key).offset)

    def turn(self, key: int) -> RefreshTurn:
        """When, and by which rank, the bases of a parameter are refreshed; an unknown one has no offset."""
        return self._schedule().get(key) or RefreshTurn(0, 0, self._reports)

    def captured_energy(self) -> dict[Tensor, float]:
        """Part of a gradient that the bases keep, in [0, 1], by parameter: |projected|^2 / |gradient|^2.

        That of the gradient from which they were computed, exactly, on every rank that has a part of the parameter;
        for random bases its mean over all draws.  Not a number after a gradient that was zero or not finite.  Missing
        are parameters that were not refreshed since construction, loading or the switch to their block.  Waits for the
        device.
        """
        return dict(zip(self._energies, _numbers(list(self._energies.values())), strict=True))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._learn([group])
        hyper, params = self.hyper_of(group), group["params"]
        if hyper.rank is None:
            return
        clamped = sum(
            rank_of(self._layouts[param], hyper, name) < hyper.rank
            for name, param in members_with_names(group, 0)
            if is_projected(self._layouts[param], hyper)
        )
        vectors = sum(param.dim() < 2 for param in params)
        told = "%s: %d of the %d parameters of a group with rank=%d have "
        if clamped:
            what = told + "a side below it, which is their rank then"
            logger.info(what, type(self).__name__, clamped, len(params), hyper.rank)
        if vectors:
            what = told + "fewer than two dims and are not projected"
            logger.info(what, type(self).__name__, vectors, len(params), hyper.rank)

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh, keys: Mapping[Tensor, int] | None = None) -> None:
        super().bind(layouts, mesh, keys)
        self._energies = {param: value for param, value in self._energies.items() if param in self._layouts}
        self._learn(self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._energies = {}
        self._learn(self.param_groups)

    def _update(self) -> None:
        self._reports.clear()
        self._begin_counting()
        super()._update()
        if self._reports:
            self._settle()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_matrices": self._matrices}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("_matrices", {}), ("_turns", None), ("_reports", {}), ("_energies", {})):
            self.__dict__.setdefault(name, value)

    def _schedule(self) -> dict[int, RefreshTurn]:
        if self._turns is None:
            present = {self._keys[param]: layout for param, layout in self._layouts.items()}
            matrices = {key: matrix for key, matrix in self._matrices.items() if key in present}
            offset = offsets(self._matrices.values())
            owner = owners(matrices, present, offset)
            self._turns = {key: RefreshTurn(owner[key], offset[key], self._reports) for key in matrices}
        return self._turns

    def _learn(self, groups: list[dict[str, Any]]) -> None:
        """Take note of the projected parameters in the groups."""
        for group in groups:
            hyper = self.hyper_of(group)
            for param in group["params"]:
                self._matrices.pop(self._keys[param], None)
                if is_projected(self._layouts[param], hyper):
                    shape = self._layouts[param].as_matrix().shape
                    self._matrices[self._keys[param]] = Matrix.of(self._keys[param], shape, hyper)
        self._turns = None

    def _begin_counting(self) -> None:
        """Give state its integers that was made before its group became lazy, as with an older checkpoint."""
        for group in self.param_groups:
            if group["lazy_threshold"] is not None:
                for param in group["params"]:
                    state = self.state.get(param)
                    if state and REFRESH_AT not in state and self._keys.get(param) in self._matrices:
                        state.update({REFRESH_AT: 0, REFRESH_WAIT: 1, REFRESH_STABLE: 0})

    def _settle(self) -> None:
        """Use the reports of this step's refreshes; the device is waited for once, and only where one is read."""
        fresh = {}
        for group in self.param_groups:
            hyper = self.hyper_of(group)
            fresh.update({param: hyper for param in group["params"] if self._keys.get(param) in self._reports})
        reports = [self._reports[self._keys[param]] for param in fresh]
        self._energies.update({param: report[0] for param, report in zip(fresh, reports, strict=True)})
        told = self._mesh.is_first and logger.isEnabledFor(logging.INFO)
        if not told and all(hyper.lazy_threshold is None for hyper in fresh.values()):
            return
        values = _numbers(reports)
        for (param, hyper), (_, alike) in zip(fresh.items(), values, strict=True):
            if hyper.lazy_threshold is not None:
                settle(self.state[param], hyper, self.turn(self._keys[param]).offset, alike)
        if told:
            self._tell([energy for energy, _ in values])

    def _tell(self, energies: list[float]) -> None:
        known = [energy for energy in energies if energy == energy]
        logger.info(
            "bases of %d of %d matrices refreshed, captured energy %s%s",
            len(energies),
            len(self._schedule()),
            f"{median(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "unknown",
            f"; {len(energies) - len(known)} gradients zero or not finite" if len(known) < len(energies) else "",
        )


class GoLore(GaLore):
    """GaLore with late random bases, and the first moment carried over at every refresh.

    Args:
        params: as of `GaLore`.
        values: as of `GaLore`.
        rand_ratio: fraction of `total_steps` after which bases are random.
        total_steps: length of the run in steps; needed unless `random_from_step` says when.
        random_from_step: first step, counted from 0, whose refresh is random; instead of the two above.
        projection: as of `GaLore`; its `random_from_step` counts as the argument.
        storage: as of `ShardedOptimizer`.
        wave_bytes: as of `ShardedOptimizer`.
        compile: as of `ShardedOptimizer`.
        flat: as of `GaLore`, without `reproject_momentum`, which is on.
    Raises:
        ValueError: as of `GaLore`, or the begin of random bases is given twice or not at all.
    """

    fixed = ("reproject_momentum",)

    def __init__(
        self,
        params: Params,
        *values: Any,
        rand_ratio: float = 0.8,
        total_steps: int | None = None,
        random_from_step: int | None = None,
        projection: Projection | None = None,
        storage: Storage | None = None,
        wave_bytes: int = WAVE_BYTES,
        compile: bool | None = None,
        **flat: Any,
    ) -> None:
        name = type(self).__name__
        if random_from_step is not None:
            flat["random_from_step"] = random_from_step
        flat.update(flat_options(name, "projection", projection, flat))
        if "reproject_momentum" in flat:
            raise TypeError(f"{name} got reproject_momentum, expected none: it is on. Use {name.replace('Go', 'Ga')}.")
        first = first_random_step(name, rand_ratio, total_steps, flat.get("random_from_step"))
        flat.update(random_from_step=first, reproject_momentum=True)
        super().__init__(params, *values, storage=storage, wave_bytes=wave_bytes, compile=compile, **flat)


def first_random_step(name: str, rand_ratio: float, total_steps: int | None, random_from_step: int | None) -> int:
    """The step, counted from 0, from which GoLore's bases are random: it is given, or a fraction of `total_steps`.

    Raises:
        ValueError: both are given or none, or the fraction is none.
    """
    require(0 <= rand_ratio <= 1, "rand_ratio", rand_ratio, "a fraction in [0, 1]")
    if random_from_step is not None and total_steps is None:
        return random_from_step
    if total_steps is None or random_from_step is not None:
        raise ValueError(
            f"{name}: got total_steps={total_steps} and random_from_step={random_from_step}, expected exactly "
            "one. Give total_steps with rand_ratio, or the step itself."
        )
    # The update numbered u, from 0, is random once u / total_steps >= rand_ratio.
    return math.ceil(rand_ratio * total_steps)


def _numbers(values: list[Tensor]) -> list[Any]:
    """Equal-shaped tensors as Python numbers, with one copy from their device."""
    return torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []
