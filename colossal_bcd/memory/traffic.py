"""What an optimizer step sends, from layouts and the rules themselves, which run on tensors without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from colossal_bcd.low_rank.projection import is_projected, low_rank_layout
from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer
from colossal_bcd.optim import ShardedOptimizer, State
from colossal_bcd.optim.state.storage import as_seen
from colossal_bcd.sharding import Collect, Layout, Mesh, ShardView, resolve

Communicates = Callable[[tuple[str, ...]], bool]
"""Whether a sum over these axes needs another rank."""


@torch.no_grad()
def rounds_of(
    base: ShardedOptimizer[Any], layout: Layout, hyper: Any, communicates: Communicates, *, reduced: bool = False
) -> list[Counter[str]]:
    """Run the rule itself on tensors without data, between refreshes.

    Args:
        base: whose rule it is.
        layout: of a parameter.
        hyper: of its group.
        communicates: as of the mesh.
        reduced: whether an engine hands over low-rank gradients that are averaged already.
    Returns:
        Of each round that needs another rank, the bytes of this parameter that travel over each axis.
    """
    if reduced and isinstance(base, ReducedGradientOptimizer) and is_projected(layout, hyper):
        given = torch.empty(low_rank_layout(layout, hyper).local_shape, device="meta")
        base.take_low_rank = lambda key: given  # type: ignore[method-assign]
        try:
            return _rounds(base, layout, hyper, communicates)
        finally:
            del base.take_low_rank
    return _rounds(base, layout, hyper, communicates)


def _rounds(base: ShardedOptimizer[Any], layout: Layout, hyper: Any, communicates: Communicates) -> list[Counter[str]]:
    param = torch.empty(layout.local_shape, device="meta")
    view = ShardView(layout, param, torch.empty_like(param), keys=(-1,))
    specs = base.state_spec(layout, hyper)
    state = State(2, {name: 0 for name, spec in specs.items() if spec.kind == "scalar"})
    for name, spec in specs.items():
        stored = spec.allocate(param)
        if isinstance(stored, Tensor):
            state[name] = as_seen(spec, view, stored)
    rule, mesh, rounds = base.update(view, state, hyper), Mesh(), list[Counter[str]]()
    sent = Counter[str]()
    mesh.communicates = communicates  # type: ignore[method-assign, assignment]
    mesh.all_reduce = lambda buffer, axis: sent.update({axis: buffer.nbytes})  # type: ignore[method-assign, assignment]
    with suppress(StopIteration):
        requests = next(rule)
        while True:
            # The bases that are sought at a refresh would be decomposed by the owner of the whole: here nobody is.
            sums = [request for request in requests if not isinstance(request, Collect)]
            sent = Counter()
            totals = iter(resolve(sums, mesh))
            answers = tuple(None if isinstance(request, Collect) else next(totals) for request in requests)
            if len(sums) < len(requests) and communicates(layout.axes):
                sent.update(dict.fromkeys(layout.axes, 0))
            if sent:
                rounds.append(sent)
            requests = rule.send(answers)
    return rounds


def rounds_of_all(
    base: ShardedOptimizer[Any],
    layouts: Mapping[Any, Layout],
    communicates: Communicates,
    members: Sequence[Sequence[Any]],
    *,
    reduced: bool = False,
) -> list[Counter[str]]:
    """As `rounds_of`, of all parameters together: they travel in one collective for each round and axis.

    Args:
        base: whose rule it is.
        layouts: of the parameters that train.
        communicates: as of the mesh.
        members: parameters of each of its groups, training or not.
        reduced: as of `rounds_of`.
    """
    together: list[Counter[str]] = []
    known: dict[tuple[int, Layout], list[Counter[str]]] = {}
    for index, (group, params) in enumerate(zip(base.param_groups, members, strict=True)):
        hyper = base.hyper_of(group)
        for layout in (layouts[param] for param in params if param in layouts):
            key = index, layout
            if key not in known:
                known[key] = rounds_of(base, layout, hyper, communicates, reduced=reduced)
            together += [Counter[str]() for _ in range(len(known[key]) - len(together))]
            for total, each in zip(together, known[key], strict=False):
                total.update(each)
    return together
