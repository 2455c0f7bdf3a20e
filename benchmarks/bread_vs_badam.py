"""BREAD against BAdam, AdamW, LoRA and GaLore at equal steps: a small Llama from scratch on CPython's documentation.

    python benchmarks/bread_vs_badam.py --steps 150 --seeds 2

Every method's learning rate is swept on the first seed, and the best one is run with the others.  Writes table.md (held
out loss, peak bytes of a step and of its forward pass alone, ms per step, bytes that a rank of two sends in a step) and
loss.png.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import peft
import torch
import torch.distributed as dist
from common import heading, llama, row
from data import Corpus, load_corpus
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from colossal_bcd import AdamW, BlockOptimizer, GaLoreAdamW, param_groups
from colossal_bcd.testing import CollectiveCounter, PeakBytes, live_bytes, run_ranks

BATCH, LENGTH, HELD_OUT = 8, 64, 16
HIDDEN, LAYERS, VOCAB, RANK, PERIOD = 64, 4, 257, 8, 10


def with_adapters(model: nn.Module) -> nn.Module:
    """Adapters on all matrices of the layers."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    build: Any = peft
    adapted: nn.Module = build.get_peft_model(
        model, build.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    )
    return adapted


def blocks(**options: Any) -> Callable[[nn.Module, float, int], Optimizer]:
    """A BlockOptimizer around AdamW."""

    def make(model: nn.Module, lr: float, seed: int) -> Optimizer:
        named = list(model.named_parameters())
        base = AdamW(model.parameters(), lr=lr)
        return BlockOptimizer(base, named, switch_block_every=PERIOD, seed=seed, verbose=0, **options)

    return make


@dataclass(frozen=True)
class Method:
    """How a method trains, and the learning rates that are tried."""

    make: Callable[[nn.Module, float, int], Optimizer]
    rates: tuple[float, ...]
    adapters: bool = False

    def build(self, seed: int) -> nn.Module:
        # Blocks are trained one at a time: with the usual 0.02 the others would pass on next to nothing.
        model = llama(
            HIDDEN,
            LAYERS,
            VOCAB,
            seed,
            intermediate_size=HIDDEN * 5 // 2,
            initializer_range=HIDDEN**-0.5,
            max_position_embeddings=512,
        )
        return with_adapters(model) if self.adapters else model


def _lora(model: nn.Module, lr: float, seed: int) -> Optimizer:
    return AdamW([param for param in model.parameters() if param.requires_grad], lr=lr)


def _galore(model: nn.Module, lr: float, seed: int) -> Optimizer:
    groups = param_groups(model, rank=RANK, update_proj_gap=50, scale=1.0, target_modules=["self_attn", "mlp"])
    return GaLoreAdamW(groups, lr=lr)


METHODS = {
    "AdamW": Method(lambda model, lr, seed: AdamW(model.parameters(), lr=lr), (1e-3, 3e-3, 1e-2)),
    "BAdam": Method(blocks(), (3e-3, 1e-2, 3e-2)),
    # BREAD moves the embedding and the head, too, which are in no block by default.
    "BAdam, all": Method(blocks(include_embedding=True, include_lm_head=True), (3e-3, 1e-2, 3e-2)),
    "BREAD-SGD": Method(blocks(sgd_mode="all", sgd_lr_scaling=50.0), (3e-3, 1e-2, 3e-2)),
    "BREAD-sign": Method(blocks(sgd_mode="all", sgd_use_sign=True, sgd_lr_scaling=0.1), (3e-3, 1e-2, 3e-2)),
    "BREAD-LoRA": Method(blocks(lora_mode="all"), (1e-3, 3e-3, 1e-2), adapters=True),
    "LoRA": Method(_lora, (1e-3, 3e-3, 1e-2), adapters=True),
    "GaLore": Method(_galore, (3e-3, 1e-2, 3e-2)),
}


def sent(name: str) -> int:
    """Payload of the collectives of one step on one of two ranks, ZeRO stage 2 in bfloat16; run by run_ranks."""
    from colossalai.booster import Booster

    from colossal_bcd.booster import LowLevelZeroPlugin

    method = METHODS[name]
    model: Any = method.build(0).bfloat16()
    booster = Booster(plugin=LowLevelZeroPlugin(stage=2, precision="bf16"))
    engine: Any
    model, engine, *_ = booster.boost(model, method.make(model, 1e-3, 0))
    tokens = torch.randint(0, VOCAB, (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in range(2):
        with CollectiveCounter() as counter:
            booster.backward(model(input_ids=tokens, labels=tokens).loss, engine)
            engine.step()
            engine.zero_grad()
        if step == 1:
            return sum(counter.bytes.values())
    raise AssertionError("the second step is measured")


@dataclass
class Run:
    """One training run."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """Step and held-out loss."""
    milliseconds: float = 0.0
    peak: int = 0
    forward_peak: int = 0
    """Before any gradient exists: weights, state, activations."""

    @property
    def final(self) -> float:
        loss = self.losses[-1][1]
        return loss if math.isfinite(loss) else math.inf


@torch.no_grad()
def held_out_loss(model: nn.Module, corpus: Corpus) -> float:
    """Mean loss of the first held-out sequences."""
    model.eval()
    batch = corpus.held_out[:HELD_OUT]
    loss: float = model(input_ids=batch, labels=batch).loss.item()
    model.train()
    return loss


def train(name: str, lr: float, seed: int, steps: int, corpus: Corpus) -> Run:
    """Train once; the peak is that of the third step, weights and state included."""
    method = METHODS[name]
    before = live_bytes()
    model = method.build(seed).train()
    optimizer = method.make(model, lr, seed)
    run, seconds = Run(), []
    run.losses.append((0, held_out_loss(model, corpus)))
    for step in range(1, steps + 1):
        batch = corpus.batch(step, BATCH, seed)
        resting = live_bytes() - before if step == 3 else 0
        began = time.perf_counter()
        if step == 3:
            with PeakBytes() as alive:
                model(input_ids=batch, labels=batch)
            run.forward_peak = resting + alive.peak
            with PeakBytes() as alive:
                _step(model, optimizer, batch)
            run.peak = resting + alive.peak
        else:
            _step(model, optimizer, batch)
            seconds.append(time.perf_counter() - began)
        if step % max(steps // 10, 1) == 0:
            run.losses.append((step, held_out_loss(model, corpus)))
    run.milliseconds = 1000 * statistics.median(seconds)
    return run


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def table(best: dict[str, tuple[float, list[Run]]], traffic: dict[str, int], head: str) -> str:
    """Markdown, one row per method."""
    cells = ("method", "lr", "held-out loss", "peak MB", "of the forward pass", "ms/step", "kB sent/step")
    lines = [head, "", heading(cells)]
    for name, (lr, runs) in best.items():
        loss = statistics.mean(run.final for run in runs)
        spread = max(run.final for run in runs) - min(run.final for run in runs)
        peaks = [max(run.peak for run in runs) / 1e6, max(run.forward_peak for run in runs) / 1e6]
        ms = statistics.median(run.milliseconds for run in runs)
        figures = (f"{peaks[0]:.1f}", f"{peaks[1]:.1f}", f"{ms:.0f}", f"{traffic[name] / 1e3:.0f}")
        lines.append(row([name, f"{lr:g}", f"{loss:.3f} ({spread:.3f})", *figures]))
    return "\n".join(lines) + "\n"


def plot(best: dict[str, tuple[float, list[Run]]], path: Path) -> None:
    """Mean held-out loss over steps, one curve per method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (lr, runs) in best.items():
        steps = [step for step, _ in runs[0].losses]
        means = [statistics.mean(run.losses[index][1] for run in runs) for index in range(len(steps))]
        axes.plot(steps, means, label=f"{name} (lr {lr:g})", linestyle="--" if name in ("LoRA", "GaLore") else "-")
    axes.set(xlabel="optimizer steps", ylabel="held-out loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--steps", default=150, show_default=True, type=click.IntRange(min=10))
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--method", "chosen", multiple=True, type=click.Choice(list(METHODS)), help="Default: all of them.")
@click.option("--output", default=Path("runs/bread"), show_default=True, type=click.Path(path_type=Path))
def main(steps: int, seeds: int, chosen: tuple[str, ...], output: Path) -> None:
    """Sweep, train, measure, write."""
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    corpus = load_corpus(None, None, "byte", 257, LENGTH, HELD_OUT)
    best: dict[str, tuple[float, list[Run]]] = {}
    for name in chosen or METHODS:
        swept = {lr: train(name, lr, 0, steps, corpus) for lr in METHODS[name].rates}
        lr = min(swept, key=lambda rate: swept[rate].final)
        best[name] = lr, [swept[lr], *(train(name, lr, seed, steps, corpus) for seed in range(1, seeds))]
        finals = ", ".join(f"{rate:g}: {run.final:.3f}" for rate, run in swept.items())
        console.print(f"{name}: held-out loss by learning rate {finals}")
    traffic = {name: max(run_ranks(2, sent, name)) for name in best}
    output.mkdir(parents=True, exist_ok=True)
    head = f"{steps} steps of {BATCH}x{LENGTH} tokens, {seeds} seeds (spread in brackets), blocks of {PERIOD} steps"
    (output / "table.md").write_text(table(best, traffic, head))
    plot(best, output / "loss.png")
    console.print((output / "table.md").read_text())


if __name__ == "__main__":
    main()
