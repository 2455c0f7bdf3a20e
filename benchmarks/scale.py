"""Simulate the optimizer of one rank of a large job: Llama-405B shapes on tp8 x zero128 x pp16, in this process alone.

    python benchmarks/scale.py
    python benchmarks/scale.py --model tiny --tp 2 --zero 4 --pp 2 --optimizer galore

The whole model exists as shapes, and of the weights only what the rank has of its pipeline stage, with random
gradients.  torch's fake process groups take the place of the other ranks: collectives are called and counted, and
nothing travels.  Bookkeeping is all memory of Python objects that optimizer and layouts need, and every tensor beside
weights, gradients and state; not torch's own table of ranks.  The rank is one that decomposes no matrix; the last
column is about those that do.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist
from common import Table, environment, ratio, to_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

import colossal_bcd
from colossal_bcd import BlockOptimizer
from colossal_bcd.block.trained import trained_of
from colossal_bcd.low_rank.refresh_schedule import Matrix
from colossal_bcd.optim import ShardedOptimizer
from colossal_bcd.sharding import Layout, Mesh, TensorSplit
from colossal_bcd.testing import CollectiveCounter, live_bytes, storages

HEADER = (
    "optimizer", "bookkeeping / state", "construction, s", "first step / later step", "first step, s", "later step, s",
    "bookkeeping, kB", "state, kB", "tensors", "collectives", "sent, kB", "collectives of a refresh",
    "sent by a refresh, kB", "largest owner / least possible",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a Llama."""

    hidden: int
    inner: int
    key_width: int
    layers: int
    vocab: int
    rank: int
    """Of projections."""


MODELS = {
    "405b": Sizes(hidden=16384, inner=53248, key_width=1024, layers=126, vocab=128256, rank=128),
    "tiny": Sizes(hidden=64, inner=160, key_width=16, layers=4, vocab=128, rank=4),
}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    dim: int | None
    """That tensor parallelism divides."""
    stage: int


@dataclass(frozen=True, kw_only=True)
class Position:
    """This rank among all, by axis, and the sizes of the axes."""

    tp: int
    zero: int
    pp: int
    tp_rank: int = 0
    stage: int = 0

    @property
    def zero_rank(self) -> int:
        """The last one: costly matrices go to the first."""
        return self.zero - 1

    @property
    def number(self) -> int:
        return (self.stage * self.zero + self.zero_rank) * self.tp + self.tp_rank


@dataclass(frozen=True)
class Model:
    """The whole model as shapes, which the user has before there is an optimizer."""

    sizes: Sizes
    weights: list[tuple[Weight, nn.Parameter]]

    @classmethod
    def of(cls, sizes: Sizes, pp: int) -> Model:
        """Parameters on the meta device."""
        found = weights(sizes, pp)
        return cls(sizes, [(each, nn.Parameter(torch.empty(each.shape, device="meta"))) for each in found])


def weights(sizes: Sizes, pp: int) -> list[Weight]:
    """All parameters in the order of the model; the first stages have a layer more where they are not equal."""
    hidden, inner, keys = sizes.hidden, sizes.inner, sizes.key_width
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "self_attn.q_proj.weight": ((hidden, hidden), 0),
        "self_attn.k_proj.weight": ((keys, hidden), 0),
        "self_attn.v_proj.weight": ((keys, hidden), 0),
        "self_attn.o_proj.weight": ((hidden, hidden), 1),
        "mlp.gate_proj.weight": ((inner, hidden), 0),
        "mlp.up_proj.weight": ((inner, hidden), 0),
        "mlp.down_proj.weight": ((hidden, inner), 1),
        "input_layernorm.weight": ((hidden,), None),
        "post_attention_layernorm.weight": ((hidden,), None),
    }
    least, more = divmod(sizes.layers, pp)
    stages = [stage for stage in range(pp) for _ in range(least + (stage < more))]
    found = [Weight(name="model.embed_tokens.weight", shape=(sizes.vocab, hidden), dim=0, stage=0)]
    for layer, stage in enumerate(stages):
        for name, (shape, dim) in shapes.items():
            found.append(Weight(name=f"model.layers.{layer}.{name}", shape=shape, dim=dim, stage=stage))
    last = pp - 1
    found.append(Weight(name="model.norm.weight", shape=(hidden,), dim=None, stage=last))
    found.append(Weight(name="lm_head.weight", shape=(sizes.vocab, hidden), dim=0, stage=last))
    return found


Named = list[tuple[str, nn.Parameter]]
OPTIMIZERS: Mapping[str, Callable[[Named, int], Optimizer]] = {
    "adamw": lambda named, rank: colossal_bcd.AdamW(_params(named), lr=1e-4),
    "lamb": lambda named, rank: colossal_bcd.Lamb(_params(named), lr=1e-4),
    "adafactor": lambda named, rank: colossal_bcd.Adafactor(_params(named)),
    "came": lambda named, rank: colossal_bcd.CAME(_params(named), lr=1e-4),
    "galore": lambda named, rank: colossal_bcd.GaLoreAdamW(_galore_groups(named, rank), lr=1e-4),
    "badam": lambda named, rank: BlockOptimizer(
        colossal_bcd.AdamW(_params(named), lr=1e-4), named, switch_mode="ascending", verbose=0
    ),
}


def _params(named: Named) -> list[nn.Parameter]:
    return [param for _, param in named]


def _galore_groups(named: Named, rank: int) -> list[dict[str, Any]]:
    projected = [param for name, param in named if "layers." in name and param.dim() == 2]
    ids = {id(param) for param in projected}
    rest = [param for _, param in named if id(param) not in ids]
    return [{"params": projected, "rank": rank, "update_proj_gap": 200, "scale": 0.25}, {"params": rest}]


@contextmanager
def fake_ranks(at: Position) -> Iterator[Mesh]:
    """The mesh of a rank whose process groups are torch's fake ones."""
    hook = sys.excepthook  # torch's writes the rank before every line of an error
    dist.init_process_group("fake", rank=at.number, world_size=at.tp * at.zero * at.pp, store=FakeStore())
    try:
        first = at.stage * at.zero * at.tp
        tp = dist.new_group([first + at.zero_rank * at.tp + rank for rank in range(at.tp)])
        zero = dist.new_group([first + rank * at.tp + at.tp_rank for rank in range(at.zero)])
        assert isinstance(tp, dist.ProcessGroup)
        assert isinstance(zero, dist.ProcessGroup)
        yield Mesh({"tp": tp, "zero": zero})
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


@dataclass
class Rank:
    """The optimizer of a rank."""

    base: ShardedOptimizer[Any]
    masters: list[Tensor]
    optimizer: Optimizer
    """A block optimizer around `base`, or `base`."""

    @classmethod
    def construct(cls, name: str, model: Model, at: Position, mesh: Mesh) -> Rank:
        """Make the optimizer of the whole model, and bind it to what this rank has of what trains."""
        named = [(weight.name, param) for weight, param in model.weights]
        optimizer = OPTIMIZERS[name](named, model.sizes.rank)
        trained = trained_of(optimizer)
        base: Any = trained.base_optimizer
        numbers, of = trained.keys(), {id(param): weight for weight, param in model.weights}
        names = set(trained.active_names())
        active = {id(param) for weight, param in named if trained.plan.is_whole or weight in names}
        layouts: dict[Tensor, Layout] = {}
        keys: dict[Tensor, int] = {}
        for group, members in zip(base.param_groups, trained.members, strict=True):
            group["params"] = []
            for param in members:
                weight = of[id(param)]
                if weight.stage != at.stage or id(param) not in active:
                    continue
                layout = layout_of(weight, at, whole_rows=not _is_elementwise(name))
                master = nn.Parameter(torch.zeros(layout.local_shape))
                layouts[master], keys[master] = layout, numbers[id(param)]
                group["params"].append(master)
        base.bind(layouts, mesh, keys)
        return cls(base, list(layouts), optimizer)

    def give_gradients(self) -> None:
        """Random ones, as after backward and average."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.randn(master.shape).mul_(1e-3)

    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(storages(dict(self.base.state)).values())

    def largest_owner(self) -> float | None:
        """Work of the rank that refreshes most, by the least that any division over ranks would leave it."""
        costs: dict[int, int] = {}
        load: Counter[int] = Counter()
        ranks = 1
        for group in self.base.param_groups:
            for param in group["params"]:
                key, layout, hyper = self.base.key_of(param), self.base.layout_of(param), self.base.hyper_of(group)
                if getattr(hyper, "rank", None) is None or len(layout.shape) < 2:
                    continue
                costs[key] = Matrix.of(key, layout.shape, hyper).cost
                owner = self.base.turn(key).owner  # type: ignore[attr-defined]
                load[owner] += costs[key]
                ranks = math.prod(axis.size for axis in (layout.slice, layout.split) if axis is not None)
        if not costs:
            return None
        return max(load.values()) / max(max(costs.values()), sum(costs.values()) / ranks)


def _is_elementwise(name: str) -> bool:
    """Whether engines slice for it without regard to rows."""
    return name in ("adamw", "lamb", "badam")


def layout_of(weight: Weight, at: Position, whole_rows: bool) -> Layout:
    """The slice of a parameter's shard that this rank has."""
    split = None
    if weight.dim is not None:
        split = TensorSplit(axis="tp", dim=weight.dim, rank=at.tp_rank, size=at.tp)
    return Layout(shape=weight.shape, split=split).sliced("zero", at.zero_rank, at.zero, whole_rows=whole_rows)


def bookkeeping(name: str, model: Model, at: Position) -> int:
    """Bytes beside weights, gradients and state after two steps."""
    gc.collect()
    before = live_bytes()
    with fake_ranks(at) as mesh:
        tracemalloc.start()
        try:
            rank = Rank.construct(name, model, at, mesh)
            for _ in range(2):
                rank.give_gradients()
                rank.base.step()
            gc.collect()
            objects = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        known = storages(rank.masters, [master.grad for master in rank.masters], dict(rank.base.state))
        return objects + max(live_bytes() - before - sum(known.values()), 0)


def cells(name: str, model: Model, at: Position, steps: int) -> list[Any]:
    """A row: the rank is made and takes its steps, and another one tells the bookkeeping."""
    begin = time.perf_counter()
    with fake_ranks(at) as mesh:
        rank = Rank.construct(name, model, at, mesh)
        construction = time.perf_counter() - begin
        taken, counters = [], []
        for _ in range(steps + 1):
            rank.give_gradients()
            with CollectiveCounter() as counter:
                begin = time.perf_counter()
                rank.base.step()
                taken.append(time.perf_counter() - begin)
            counters.append(counter)
        state, owner, number = rank.state_bytes(), rank.largest_owner(), len(rank.masters)
    del rank
    beside = bookkeeping(name, model, at)
    first, later = counters[0], counters[-1]
    refreshed = owner is not None
    return [
        name,
        ratio(beside / state, digits=4),
        f"{construction:.2f}",
        f"{taken[0] / median(taken[1:]):.2f}",
        f"{taken[0]:.3f}",
        f"{median(taken[1:]):.3f}",
        f"{beside / 1e3:.1f}",
        f"{state / 1e3:.1f}",
        number,
        later.total,
        f"{sum(later.bytes.values()) / 1e3:.1f}",
        first.total if refreshed else "-",
        f"{sum(first.bytes.values()) / 1e3:.1f}" if refreshed else "-",
        "-" if owner is None else f"{owner:.2f}",
    ]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--optimizer", "optimizers", type=click.Choice(list(OPTIMIZERS)), multiple=True, help="[default: all]")
@click.option("--model", "size", type=click.Choice(list(MODELS)), default="405b", help="Shapes.")
@click.option("--tp", type=click.IntRange(1), default=8, help="Tensor-parallel ranks.")
@click.option("--zero", type=click.IntRange(1), default=128, help="ZeRO ranks.")
@click.option("--pp", type=click.IntRange(1), default=16, help="Pipeline stages.")
@click.option("--stage", type=click.IntRange(0), default=0, help="Stage of the rank; the first has the embedding, too.")
@click.option("--steps", type=click.IntRange(1), default=3, help="Steps after the first one.")
@to_file
def main(
    optimizers: Sequence[str], size: str, tp: int, zero: int, pp: int, stage: int, steps: int, output: Path | None
) -> None:
    """Print one markdown table."""
    torch.set_num_threads(1)
    sizes, at = MODELS[size], Position(tp=tp, zero=zero, pp=pp, stage=stage)
    model = Model.of(sizes, pp)
    total = sum(math.prod(weight.shape) for weight, _ in model.weights)
    table = Table(
        f"{environment()} {size} ({total / 1e9:.1f} billion values, {sizes.layers} layers, width {sizes.hidden}) on "
        f"tp{tp} x zero{zero} x pp{pp}, rank {at.number} of {tp * zero * pp}; projections of rank {sizes.rank}, "
        f"1 kB = 1000. A later step is the median of {steps}.",
        HEADER,
        output,
    )
    for name in optimizers or OPTIMIZERS:
        table.add(cells(name, model, at, steps))


if __name__ == "__main__":
    main()
