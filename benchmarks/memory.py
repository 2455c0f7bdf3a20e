"""Measure bytes of a rank beyond the weights, beside the estimate that is made before anything is allocated.

    python benchmarks/memory.py
    python benchmarks/memory.py --mesh "tp2+zero2 x4" --optimizer came --optimizer badam

Bytes are those of the storages of live tensors, between steps and at most in a step, gradients included.  It starts its
own ranks; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from common import MESHES, Table, environment, llama, ratio, to_file
from torch.optim import Optimizer

import colossal_bcd
from colossal_bcd import BlockOptimizer, param_groups
from colossal_bcd.testing import PeakBytes, live_bytes, run_ranks

HEADER = (
    "optimizer", "mesh", "measured / estimate, between steps", "measured / estimate, in a step",
    "between steps / AdamW's", "in a step / AdamW's", "between steps, kB",
    "estimate between steps, kB", "in a step, kB", "estimate in a step, kB",
)  # fmt: skip


def _plain(name: str, **hyper: Any) -> Callable[[Any], Optimizer]:
    build = getattr(colossal_bcd, name)
    return lambda model: build(model.parameters(), **hyper)


def _galore(model: Any) -> Optimizer:
    rank = model.config.hidden_size // 16
    return colossal_bcd.GaLoreAdamW(
        param_groups(model, rank=rank, update_proj_gap=200, scale=0.25), lr=1e-3, svd_method="random"
    )


def _blocks(model: Any) -> Optimizer:
    base = colossal_bcd.AdamW(model.parameters(), lr=1e-3)
    return BlockOptimizer(base, list(model.named_parameters()), switch_block_every=100, verbose=0)


OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "adamw": _plain("AdamW", lr=1e-3),
    "adamw, 8-bit moment": _plain("AdamW", lr=1e-3, moment_bits=8),
    "lion": _plain("Lion", lr=1e-4),
    "lamb": _plain("Lamb", lr=1e-3),
    "adafactor": _plain("Adafactor"),
    "came": _plain("CAME", lr=1e-3),
    "galore": _galore,
    "badam": _blocks,
}
"""By the name that the command line takes; AdamW comes first, as the others are divided by it."""


def measure(mesh: str, name: str, hidden: int, layers: int) -> dict[str, int]:
    """Bytes of this rank beyond the weights, measured and estimated."""
    from colossalai.booster import Booster

    import colossal_bcd.booster

    model: Any = llama(hidden, layers).bfloat16()
    optimizer = OPTIMIZERS[name](model)
    booster = Booster(plugin=getattr(colossal_bcd.booster, MESHES[mesh].plugin)(**_options(mesh)))
    engine: Any
    model, engine, *_ = booster.boost(model, optimizer)
    masters = sum(master.nbytes for param, master in engine.masters.of.items() if master.data_ptr() != param.data_ptr())
    before = live_bytes() - masters
    tokens = torch.randint(0, 1024, (1, 16), generator=torch.Generator().manual_seed(0))
    most = 0
    for _ in range(3):  # the second one stacks state, and engines see it in the third
        booster.backward(model(tokens, labels=tokens).loss, engine)
        with PeakBytes() as alive:
            resting = live_bytes()
            engine.step()
        engine.zero_grad()
        most = resting + alive.peak
    guess = colossal_bcd.booster.estimate(engine)
    return {
        "between": live_bytes() - before,
        "in step": most - before,
        "between, estimate": guess.between_steps,
        "in step, estimate": guess.in_step,
    }


def _options(mesh: str) -> dict[str, Any]:
    return {**MESHES[mesh].options, "precision": "bf16"}


def cells(name: str, mesh: str, found: Mapping[str, int], adamw: Mapping[str, int] | None) -> list[Any]:
    """A row."""
    told = [found[key] / found[f"{key}, estimate"] for key in ("between", "in step")]
    shares = ["-" if adamw is None else f"{found[key] / adamw[key]:.3f}" for key in ("between", "in step")]
    sizes = [f"{found[key] / 1e3:.1f}" for key in ("between", "between, estimate", "in step", "in step, estimate")]
    return [name, mesh, ratio(told[0]), f"{told[1]:.2f}", *shares, *sizes]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--mesh", "meshes", type=click.Choice(list(MESHES)), multiple=True, help="[default: the first two]")
@click.option("--optimizer", "optimizers", type=click.Choice(list(OPTIMIZERS)), multiple=True, help="[default: all]")
@click.option("--hidden", type=click.IntRange(16), default=256, help="Width of the Llama.")
@click.option("--layers", type=click.IntRange(1), default=8, help="Layers of the Llama.")
@to_file
def main(meshes: Sequence[str], optimizers: Sequence[str], hidden: int, layers: int, output: Path | None) -> None:
    """Print one markdown table."""
    torch.set_num_threads(1)
    model = f"Llama of {layers} layers of width {hidden} in bf16; bytes of rank 0 beyond the weights, 1 kB = 1000."
    table = Table(f"{environment('colossalai', 'transformers')} {model}", HEADER, output)
    for mesh in meshes or list(MESHES)[:2]:
        adamw = None
        for name in optimizers or OPTIMIZERS:
            found = run_ranks(MESHES[mesh].num_ranks, measure, mesh, name, hidden, layers, timeout=600.0)[0]
            adamw = found if name == "adamw" else adamw
            table.add(cells(name, mesh, found, adamw))


if __name__ == "__main__":
    main()
