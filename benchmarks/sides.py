"""Compare weights with those of the originals, after five steps and after going on from files.

    python benchmarks/sides.py

Two ZeRO-2 ranks train a Llama in float32 with ours under our plugin and with ColossalAI's distributed optimizer under
ColossalAI's plugin, on gradients that are given and equal on both; the original trains it on one process.  After three
steps each writes its files, and new objects go on from them.  It starts its own ranks; no GPU is needed.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import came_pytorch
import click
import torch
import torch.distributed as dist
import transformers
from colossalai.booster import Booster
from colossalai.booster import plugin as stock
from colossalai.nn.optimizer import DistributedAdaFactor, DistributedCAME, DistributedLamb
from colossalai.nn.optimizer import Lamb as TheirLamb
from colossalai.zero.low_level import LowLevelZeroOptimizer
from common import ONE_STREAM, Table, environment, llama, to_file
from torch import Tensor, nn

from colossal_bcd import CAME, Adafactor, Lamb
from colossal_bcd import booster as our_booster
from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator
from colossal_bcd.testing import run_ranks

HEADER = ("optimizer", "side", "error / movement", "error after going on from files / movement")
SAVED, STEPS = 3, 5
OURS, THEIRS, ORIGINAL = "ours, 2 ranks", "ColossalAI's, 2 ranks", "the original, 1 process"


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Classes that compute the same, and the hyper-parameters that all get."""

    ours: Any
    theirs: Any
    original: Any
    hyper: Mapping[str, Any]


SIDES = {
    "lamb": Sides(ours=Lamb, theirs=DistributedLamb, original=TheirLamb, hyper={"lr": 1e-3, "bias_correction": False}),
    "adafactor": Sides(
        ours=Adafactor, theirs=DistributedAdaFactor, original=transformers.Adafactor, hyper={"relative_step": True}
    ),
    "came": Sides(ours=CAME, theirs=DistributedCAME, original=came_pytorch.CAME, hyper={"lr": 1e-3}),
}


def backward(model: nn.Module, number: int, backwards: Callable[[Tensor], Any]) -> None:
    """Give every weight its gradient of a step, which is that of a sum of products."""
    generator = torch.Generator().manual_seed(number)
    products = [(param * torch.randn(param.shape, generator=generator)).sum() for param in model.parameters()]
    backwards(torch.stack(products).sum())


def original(name: str, hidden: int, layers: int, folder: str) -> float:
    """Train on one process, and write the weights before and after; the difference after going on."""
    sides = SIDES[name]
    model = llama(hidden, layers)
    optimizer = sides.original(model.parameters(), **sides.hyper)
    before = copy.deepcopy(model.state_dict())
    saved: Any = None

    def train(first: int, last: int) -> None:
        for number in range(first, last):
            backward(model, number, lambda loss: loss.backward())
            optimizer.step()
            optimizer.zero_grad()

    train(0, SAVED)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(SAVED, STEPS)
    want = copy.deepcopy(model.state_dict())
    torch.save((before, want), f"{folder}/{name}.pt")
    model = llama(hidden, layers, seed=1)
    optimizer = sides.original(model.parameters(), **sides.hyper)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(SAVED, STEPS)
    return difference(model.state_dict(), want, before)


def difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """Norm of the difference by the norm of the movement."""
    wrong = sum(float((got[name].double() - want[name]).square().sum()) for name in want)
    moved = sum(float((want[name].double() - before[name]).square().sum()) for name in want)
    return float((wrong / moved) ** 0.5)


def on_ranks(name: str, side: str, hidden: int, layers: int, folder: str) -> tuple[float, float | str]:
    """Train on this rank: the error, and that after going on, or how this fails."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    install_cpu_accelerator()
    # The check refuses a CPU; everything else runs there.
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
    host, cls = (our_booster, SIDES[name].ours) if side == OURS else (stock, SIDES[name].theirs)

    def boosted(seed: int) -> tuple[Booster, Any, Any]:
        booster = Booster(plugin=host.LowLevelZeroPlugin(stage=2, precision="fp32", **ONE_STREAM))
        model = llama(hidden, layers, seed=seed)
        made, engine, *_ = booster.boost(model, cls(list(model.parameters()), **SIDES[name].hyper))
        return booster, made, engine

    def train(booster: Booster, model: Any, engine: Any, first: int, last: int) -> None:
        for number in range(first, last):
            backward(model.unwrap(), number, lambda loss: booster.backward(loss, engine))
            engine.step()
            engine.zero_grad()

    before, want = torch.load(f"{folder}/{name}.pt", weights_only=True)
    path = f"{folder}/{name} {side}"
    booster, model, engine = boosted(0)
    train(booster, model, engine, 0, SAVED)
    failed = ""
    try:
        booster.save_model(model, f"{path}/model", shard=True)
        booster.save_optimizer(engine, f"{path}/optimizer", shard=True)
    except Exception as raised:  # of either side: what it says is the cell
        failed = _told("saving", raised)
    dist.barrier()
    train(booster, model, engine, SAVED, STEPS)
    got = copy.deepcopy(model.unwrap().state_dict())
    error = difference(got, want, before)
    if failed:
        return error, failed
    try:
        booster, model, engine = boosted(1)
        booster.load_model(model, f"{path}/model")
        booster.load_optimizer(engine, f"{path}/optimizer")
        train(booster, model, engine, SAVED, STEPS)
    except Exception as raised:
        return error, _told("loading", raised)
    return error, difference(model.unwrap().state_dict(), got, before)


def _told(what: str, error: Exception) -> str:
    return f"{what} fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--hidden", type=click.IntRange(16), default=128, help="Width of the Llama.")
@click.option("--layers", type=click.IntRange(1), default=4, help="Layers of the Llama.")
@click.option("--optimizer", "names", type=click.Choice(list(SIDES)), multiple=True, help="[default: all]")
@to_file
def main(hidden: int, layers: int, names: tuple[str, ...], output: Path | None) -> None:
    """Print one markdown table."""
    torch.set_num_threads(1)
    about = (
        f"{environment('colossalai', 'transformers', 'came_pytorch')} 2 ranks of ZeRO-2, Llama of width {hidden} with "
        f"{layers} layers in float32, {STEPS} steps, files after {SAVED}. Norms of all weights together."
    )
    table = Table(about, HEADER, output)
    with tempfile.TemporaryDirectory() as folder:
        for name in names or SIDES:
            (resumed,) = run_ranks(1, original, name, hidden, layers, folder, timeout=600.0)
            table.add([name, ORIGINAL, "0", _figure(resumed)])
            for side in (OURS, THEIRS):
                ranks = run_ranks(2, on_ranks, name, side, hidden, layers, folder, timeout=600.0)
                failed = next((again for _, again in ranks if isinstance(again, str)), None)
                worst = max(float("inf") if isinstance(again, str) else again for _, again in ranks)
                table.add([name, side, _figure(max(error for error, _ in ranks)), failed or _figure(worst)])


def _figure(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}"


if __name__ == "__main__":
    main()
