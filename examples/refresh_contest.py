"""What benchmark_refresh.py measures: bases of single matrices, and refresh steps of GaLore on one rank and on two."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from data import load_corpus
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_bcd import GaLoreAdamW
from colossal_bcd.low_rank.projector import Bases, Method, captured_energy, random_bases, singular_bases, subspace_bases
from colossal_bcd.sharding import Layout, Mesh

VOCABULARY = 2048


@dataclass(frozen=True)
class Seconds:
    """Of one step: by the clock on the rank that took longest, and of processor time on the busiest rank."""

    wall: float
    cpu: float


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
    torch.manual_seed(0)
    rows, hidden = shape
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=max(rows, 2 * hidden),
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    length = 256
    corpus = load_corpus(None, None, "bpe", VOCABULARY, length, 1)
    model = LlamaForCausalLM(config)
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
class Contestant:
    """One way to compute bases, on one matrix."""

    seconds: tuple[float, ...]
    energy: float


def methods_on(before: Tensor, matrix: Tensor, rank: int, repeats: int) -> dict[str, Contestant]:
    """Exact singular vectors, subspace iteration from nothing and from the last bases, and random bases, in turn."""
    side = "right"
    last = singular_bases(before, rank, side)
    ways: dict[str, Callable[[], Bases]] = {
        "exact": lambda: singular_bases(matrix, rank, side),
        "subspace": lambda: subspace_bases(matrix, rank, side, (None, None), seed=1),
        "subspace, warm": lambda: subspace_bases(matrix, rank, side, last, seed=1),
        "random": lambda: random_bases((matrix.shape[0], matrix.shape[1]), rank, side, 1, matrix),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    energies: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, compute in ways.items():
            begin = time.process_time()
            bases = compute()
            if repeat:  # the first one is warm-up
                seconds[name].append(time.process_time() - begin)
            energies[name] = captured_energy(matrix, bases).item()
    return {name: Contestant(tuple(seconds[name]), energies[name]) for name in ways}


def refresh_steps(sizes: Sizes, method: Method, rank: int, repeats: int) -> dict[str, list[Seconds]]:
    """Steps that refresh all bases, in turn on all ranks and on rank 0 alone, while the others sleep."""
    together, alone = _Side(sizes, method, rank, gap=1), None
    if dist.get_rank() == 0:
        alone = _Side(sizes, method, rank, gap=1, sharded=False)
    found: dict[str, list[Seconds]] = {"together": [], "alone": []}
    for _ in range(repeats + 1):
        found["together"].append(_slowest(together.step))
        found["alone"].append(_slowest(alone.step if alone is not None else None))
    return {name: seconds[1:] for name, seconds in found.items()}


def staggered_steps(sizes: Sizes, method: Method, rank: int, gap: int, repeats: int) -> dict[str, list[Seconds]]:
    """All steps of some gaps, with every layer refreshed in the same step and with the refreshes spread, in turn."""
    sides = {"together": _Side(sizes, method, rank, gap), "staggered": _Side(sizes, method, rank, gap, stagger=gap)}
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    for step in range(gap * (repeats + 1)):
        for name, side in sides.items():
            seconds = _slowest(side.step)
            if step >= gap:  # the first gap, which begins with a refresh of everything, is warm-up
                found[name].append(seconds)
    return found


class _Side:
    """GaLore on this rank's slices of the matrices, or on whole ones."""

    def __init__(
        self, sizes: Sizes, method: Method, rank: int, gap: int, *, stagger: int = 1, sharded: bool = True
    ) -> None:
        world, place = (dist.get_world_size(), dist.get_rank()) if sharded else (1, 0)
        layouts = [Layout.whole(shape).sliced("zero", place, world) for shape in sizes.shapes]
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


def _slowest(step: Callable[[], None] | None) -> Seconds:
    """Time of one step on the rank that takes longest."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    if step is not None:
        step()
    spent = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return Seconds(*spent.tolist())


def chosen(sizes: Sequence[str]) -> list[tuple[int, int]]:
    """Shapes from their names, such as "2048x2048"."""
    return [(int(rows), int(columns)) for rows, _, columns in (size.partition("x") for size in sizes)]
