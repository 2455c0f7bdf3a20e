"""Time refreshes of GaLore's projectors: by method and against galore_torch, on two ranks against one, and staggered.

    python benchmarks/refresh.py
    python benchmarks/refresh.py --part methods --shape 1024x1024 --train-steps 0
    python benchmarks/refresh.py --part ranks --method subspace

"real" gradients are those of a one-layer Llama on the text that ships with CPython; the others are noise, alone or on
a steady matrix of the given rank.  The energy is what a projector keeps of a gradient, by the most that is possible.
Both sides take turns.  It starts its own ranks; no GPU is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import torch
import torch.distributed as dist
from common import Measured, Table, environment, in_turn, llama, ratio, to_file
from data import load_corpus
from torch import Tensor, nn

from colossal_bcd import GaLoreAdamW
from colossal_bcd.low_rank.projector import Bases, Method, captured_energy, random_bases, singular_bases, subspace_bases
from colossal_bcd.sharding import Layout, Mesh
from colossal_bcd.testing import run_ranks

HEADER = (
    "refresh", "of", "against", "its time / time, processor", "its time / time", "processor ms", "its processor ms",
    "ms", "its ms", "energy / exact energy", "collectives",
)  # fmt: skip
PARTS = ("methods", "ranks", "stagger")
VOCABULARY = 2048


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Matrices of a Llama: seven per layer."""

    hidden: int = 512
    layers: int = 4

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of all matrices, in the order of the layers."""
        hidden, inner = self.hidden, self.hidden * 8 // 3 // 16 * 16
        return [*[(hidden, hidden)] * 4, *[(inner, hidden)] * 2, (hidden, inner)] * self.layers


def real_gradients(shape: tuple[int, int], train_steps: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Gradients of a matrix of a one-layer Llama on the text that ships with CPython: of two successive steps.

    Square ones are those of the query projection, others those of the gate projection [inner, hidden].

    Args:
        shape: [R, C] with R >= C.
        train_steps: AdamW steps before.
        tokens: in a batch.
    """
    rows, hidden = shape
    length = 256
    corpus = load_corpus(None, None, "bpe", VOCABULARY, length, 1)
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), max(hidden // 64, 1))
    model: Any = llama(hidden, 1, VOCABULARY, intermediate_size=max(rows, 2 * hidden), **heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    layer = model.model.layers[0]
    weight = layer.self_attn.q_proj.weight if rows == hidden else layer.mlp.gate_proj.weight
    kept: list[Tensor] = []
    for step in range(train_steps + 2):
        batch = corpus.batch(step, tokens // length, 0)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        kept = [*kept[-1:], weight.grad.clone()]
        optimizer.step()
    return kept[0], kept[1]


def noisy_gradients(shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two draws of noise, on a steady matrix of the given rank that has as much energy; rank 0: of noise alone."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    low = low / max(rank, 1) ** 0.5
    return low + torch.randn(shape, generator=generator), low + torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Way:
    """One way to compute bases, on one matrix."""

    taken: Measured
    energy: float


def methods_on(before: Tensor, matrix: Tensor, rank: int, repeats: int) -> dict[str, Way]:
    """Exact singular vectors, ours and galore_torch's; subspace iteration, from the last bases too; random bases."""
    side = "right"
    last = singular_bases(before, rank, side)
    original = importlib.import_module("galore_torch.galore_projector").GaLoreProjector(rank)
    ways: dict[str, Callable[[], Bases]] = {
        "exact": lambda: singular_bases(matrix, rank, side),
        "galore_torch": lambda: (None, original.get_orthogonal_matrix(matrix, rank, type="right").T),
        "subspace": lambda: subspace_bases(matrix, rank, side, (None, None), seed=1),
        "subspace, from the last": lambda: subspace_bases(matrix, rank, side, last, seed=1),
        "random": lambda: random_bases((matrix.shape[0], matrix.shape[1]), rank, side, 1, matrix),
    }
    bases: dict[str, Bases] = {}

    def work(name: str) -> Callable[[], None]:
        return lambda: bases.update({name: ways[name]()})

    found = in_turn({name: work(name) for name in ways}, repeats, 1)
    return {name: Way(found[name], captured_energy(matrix, bases[name]).item()) for name in ways}


def refresh_steps(sizes: Sizes, method: Method, rank: int, repeats: int) -> dict[str, Measured]:
    """Steps that refresh all bases, in turn on all ranks and on rank 0 alone, while the others wait."""
    together = _Side(sizes, method, rank, gap=1)
    alone: Callable[[], None] = lambda: None  # noqa: E731
    if dist.get_rank() == 0:
        alone = _Side(sizes, method, rank, gap=1, sharded=False).step
    return in_turn({"together": together.step, "alone": alone}, repeats, 1)


def staggered_steps(sizes: Sizes, method: Method, rank: int, gap: int, repeats: int) -> dict[str, Measured]:
    """All steps of some gaps, with every layer refreshed in the same step and with the refreshes spread, in turn."""
    sides = {"together": _Side(sizes, method, rank, gap), "staggered": _Side(sizes, method, rank, gap, stagger=gap)}
    # The first gap, which begins with a refresh of everything, is warm-up.
    return in_turn({name: side.step for name, side in sides.items()}, gap * repeats, gap)


class _Side:
    """GaLore on this rank's slices of the matrices, or on whole ones."""

    def __init__(
        self, sizes: Sizes, method: Method, rank: int, gap: int, *, stagger: int = 1, sharded: bool = True
    ) -> None:
        world, rank_of_slice = (dist.get_world_size(), dist.get_rank()) if sharded else (1, 0)
        layouts = [Layout.whole(shape).sliced("zero", rank_of_slice, world) for shape in sizes.shapes]
        params = [nn.Parameter(torch.zeros(layout.local_shape)) for layout in layouts]
        for index, (param, layout) in enumerate(zip(params, layouts, strict=True)):
            whole = torch.randn(layout.shape, generator=torch.Generator().manual_seed(index))
            param.grad = layout.shard(whole)
        self._optimizer = GaLoreAdamW(
            [{"params": params, "rank": rank}], update_proj_gap=gap, stagger=stagger, svd_method=method, clamp=True
        )
        group = dist.group.WORLD if sharded else None
        mesh = Mesh({"zero": () if group is None else group})
        self._optimizer.bind(dict(zip(params, layouts, strict=True)), mesh)

    def step(self) -> None:
        self._optimizer.step()


def cells(
    start: Sequence[str], this: Measured, other: Measured, energy: str = "-", collectives: object = "-"
) -> list[Any]:
    """A row; `start` are its first three cells."""
    times = [f"{value:.1f}" for value in (this.cpu_ms, other.cpu_ms, this.ms, other.ms)]
    return [*start, ratio(other.cpu_ms / this.cpu_ms), f"{other.ms / this.ms:.2f}", *times, energy, collectives]


def method_rows(shape: tuple[int, int], rank: int, repeats: int, train_steps: int, tokens: int) -> list[list[Any]]:
    """Rows of one shape."""
    gradients = {
        "real": real_gradients(shape, train_steps, tokens),
        "low rank + noise": noisy_gradients(shape, rank, seed=0),
        "noise": noisy_gradients(shape, 0, seed=1),
    }
    lines = []
    for name, (before, matrix) in gradients.items():
        found = methods_on(before, matrix, rank, repeats)
        exact = found["exact"]
        for way, against in (
            ("exact", "galore_torch"), ("subspace", "exact"), ("subspace, from the last", "exact"), ("random", "exact"),
        ):  # fmt: skip
            start = [way, f"{shape[0]}x{shape[1]}, {name}", against]
            share = f"{found[way].energy / exact.energy:.4f}"
            lines.append(cells(start, found[way].taken, found[against].taken, share))
    return lines


def largest(taken: Measured, gap: int) -> Measured:
    """The largest step of every gap."""

    def of(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(max(values[begin : begin + gap]) for begin in range(0, len(values), gap))

    return Measured(wall=of(taken.wall), cpu=of(taken.cpu))


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, help="Of the rows.")
@click.option("--shape", "shapes", multiple=True, default=("1024x1024", "2048x1024"), help="Rows x columns.")
@click.option(
    "--method", "methods", type=click.Choice(["exact", "subspace"]), multiple=True, default=("exact", "subspace")
)
@click.option("--rank", type=click.IntRange(1), default=128, help="Of the projections.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Measured repeats of each, after one of warm-up.")
@click.option("--train-steps", type=click.IntRange(0), default=4, help="Of the model whose gradients are taken.")
@click.option("--tokens", type=click.IntRange(256), default=2048, help="In a batch of these steps.")
@click.option("--hidden", type=click.IntRange(16), default=512, help="Of the Llama whose matrices ranks refresh.")
@click.option("--layers", type=click.IntRange(1), default=4, help="Of that Llama.")
@click.option("--gap", type=click.IntRange(2), default=8, help="Steps of a gap over which refreshes are staggered.")
@to_file
def main(
    parts: Sequence[str],
    shapes: Sequence[str],
    methods: Sequence[str],
    rank: int,
    repeats: int,
    train_steps: int,
    tokens: int,
    gap: int,
    output: Path | None,
    **sizes: int,
) -> None:
    """Print one markdown table."""
    torch.set_num_threads(1)
    llamas = Sizes(**sizes)
    count = f"{len(llamas.shapes)} matrices"
    about = (
        f"{environment('transformers', 'galore_torch')} Rank {rank}; {count} are those of a Llama of {llamas.hidden} "
        f"hidden, {llamas.layers} layers. Medians of {repeats} after one of warm-up."
    )
    table = Table(about, HEADER, output)
    if "methods" in parts:
        for rows, _, columns in (shape.partition("x") for shape in shapes):
            for line in method_rows((int(rows), int(columns)), rank, repeats, train_steps, tokens):
                table.add(line)
    narrow = min(rank, llamas.hidden)
    for method in [cast(Method, name) for name in methods]:
        if "ranks" in parts:
            found = run_ranks(2, refresh_steps, llamas, method, narrow, repeats, timeout=1200.0)[0]
            together, alone = found["together"], found["alone"]
            table.add(cells([f"{method}, 2 ranks", count, "1 rank"], together, alone, "-", together.collectives))
        if "stagger" in parts:
            found = run_ranks(2, staggered_steps, llamas, method, narrow, gap, repeats, timeout=1200.0)[0]
            sides = largest(found["staggered"], gap), largest(found["together"], gap)
            start = [f"{method}, 2 ranks, largest step of {gap}", count, "all in one step"]
            table.add(cells(start, *sides))


if __name__ == "__main__":
    main()
