"""The run that fine-tuning programs share: flags, boosting, steps, evaluations, checkpoints, results.

A program's subclass of `Run` says what a step's loss is and what is evaluated.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from figures import StepFigures, formula_of, peak_bytes
from interrupt import stop_request
from methods import plugin_of
from predecessors import Unboosted
from records import DataError
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from colossal_bcd import BlockOptimizer

MESH = ("plugin", "tp", "output", "resume", "checkpoint_every", "save")
"""Flags that a run which goes on may have different."""


def dashed(word: str) -> str:
    """A flag or a choice as the papers' programs have it, with underscores, or with dashes: both are taken."""
    return word.replace("_", "-")


CONTEXT = {"show_default": True, "token_normalize_func": dashed}
"""Settings of a program's command."""


def shared_options(output: str) -> Callable[[Any], Any]:
    """The flags that every program has; `output` is the default folder."""
    folder = click.Path(path_type=Path, file_okay=False)
    options = [
        click.option("--plugin", type=click.Choice(["zero", "hybrid", "fsdp"]), default="zero"),
        click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel ranks (hybrid)."),
        click.option(
            "--validation",
            is_flag=True,
            help="Evaluate on every tenth record of those to train on, which then does not train: to search rates.",
        ),
        click.option(
            "--implementation",
            type=click.Choice(["ours", "original"]),
            default="ours",
            help="Or the package that ours replaces, to be compared with.",
        ),
        click.option("--toy", is_flag=True, help="A tiny model from random weights."),
        click.option("--checkpoint-every", type=click.IntRange(1), default=50),
        click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, on any number of ranks."),
        click.option("--output", "--output_dir", "output", type=folder, default=Path(output)),
    ]

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def launch() -> None:
    """Join the ranks' process group; one process needs no launcher."""
    # ColossalAI announces optional kernels that it does without, once per rank.
    warnings.filterwarnings("ignore", module="colossalai")
    from colossalai import launch_from_torch

    from colossal_bcd.booster.cpu_accelerator import install_cpu_accelerator

    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    install_cpu_accelerator()
    if not dist.is_initialized():
        launch_from_torch(seed=0, verbose=False)


def tensor_parallel(flags: Mapping[str, Any]) -> int:
    """Tensor-parallel ranks of a run.

    Raises:
        DataError: `tp` does not fit the plugin or the ranks.
    """
    if dist.get_world_size() % flags["tp"] or (flags["tp"] > 1 and flags["plugin"] != "hybrid"):
        raise DataError(f"--tp {flags['tp']} needs --plugin hybrid and a multiple of as many ranks.")
    return int(flags["tp"])


class Run:
    """One rank of a run.

    Args:
        flags: of the command: those of `shared_options`, and what else says which run this is.
        model: what is trained.
        optimizer: of it.
        steps: of the whole run.
        batch: records of a step, all ranks together.
        eval_every: steps between evaluations.
        factor: of the learning rate, by number of steps taken.
    Raises:
        DataError: the ranks cannot share the batch, or the output folder has checkpoints of another run.
    """

    def __init__(
        self,
        flags: dict[str, Any],
        model: Any,
        optimizer: Optimizer,
        *,
        steps: int,
        batch: int,
        eval_every: int,
        factor: Callable[[int], float],
    ) -> None:
        from colossalai.booster import Booster
        from colossalai.utils import get_current_device

        from colossal_bcd.booster import CheckpointFolder

        self.flags, self.steps, self.eval_every = flags, steps, eval_every
        self.rank, self.size, self.tp = dist.get_rank(), dist.get_world_size(), tensor_parallel(flags)
        self.shares = self.size // self.tp
        if batch % self.shares:
            raise DataError(f"--batch-size {batch} is no multiple of {self.shares} ranks' shares. Give one that is.")
        self.folder = CheckpointFolder(flags["output"] / "checkpoints", keep_last=2)
        if self.folder.latest is not None and not flags["resume"]:
            raise DataError(
                f"{self.folder.path} has step {self.folder.latest} of an earlier run. Go on from there with --resume, "
                "or give another --output."
            )
        self.optimizer: Any = optimizer
        self.device = get_current_device()
        self.is_original = flags.get("implementation") == "original"
        self.booster: Any = Unboosted()
        if not self.is_original:
            self.booster = Booster(plugin=plugin_of(flags["plugin"], flags["precision"], self.tp))
        self.boosted: Any
        self.boosted, self.engine, _, _, self.scheduler = self.booster.boost(
            model, optimizer, lr_scheduler=LambdaLR(optimizer, factor)
        )
        self.figures = StepFigures(self.boosted, optimizer)
        # Dropout differs between shares of a batch; ranks that divide a layer draw the same.
        torch.manual_seed(flags.get("seed", 0) * 1000 + self.rank // self.tp)

    def loss(self, step: int) -> tuple[Tensor, int]:
        """The mean loss of this rank's share of a step's records, and the number of its tokens."""
        raise NotImplementedError

    def backward(self, step: int) -> tuple[Tensor, int]:
        """Make the gradients of a step; return what `loss` does."""
        loss, tokens = self.loss(step)
        self.booster.backward(loss, self.engine)
        return loss, tokens

    def evaluate(self) -> dict[str, float]:
        """Figures of what is held out, the same on every rank; the model is in eval mode, without gradients."""
        raise NotImplementedError

    def first(self) -> dict[str, Any]:
        """What results have before the first step."""
        return {"losses": {}, "held_out": {"0": self._evaluated()}}

    def last(self, results: dict[str, Any]) -> None:
        """Add to the results what is found after the last step."""

    def train(self) -> None:
        """Steps, evaluations and checkpoints, until the last step or until somebody asks to stop."""
        flags, saved = self.flags, self._saved()
        if saved is None:
            results = self.first()
            self.say(f"{_written(results['held_out']['0'])} before the first step")
        else:
            self.folder.load(self.booster, self.boosted, self.engine, self.scheduler, step=saved.step)
            results = saved.extra["results"]
        taken = 0 if saved is None else saved.step
        # The bar is for people: it stays away from files and from the other ranks.
        bar = tqdm(range(taken + 1, self.steps + 1), disable=True if self.rank else None, leave=False)
        stop_request.training = True
        for step in bar:
            block = self.block()
            loss, tokens, stop = self._step(step, block)
            results["losses"][str(step)] = loss
            now = f"{block}  {tokens / self.figures.seconds[-1]:.0f} tokens/s  {peak_bytes() / 2**20:.0f} MiB"
            bar.set_postfix_str(f"loss {loss:.3f}  {now}")
            if (step % self.eval_every == 0 or step == self.steps) and not stop:
                results["held_out"][str(step)] = self._evaluated()
                held_out = _written(results["held_out"][str(step)])
                self.say(f"step {step}/{self.steps}  loss {loss:.3f}, {held_out}  {now}")
            if (stop or step % flags["checkpoint_every"] == 0) and not self.is_original:
                extra = {"results": results, "run": self._identity()}
                self.folder.save(self.booster, self.boosted, self.engine, self.scheduler, step=step, extra=extra)
            if stop:
                stop_request.received = True
                then = "" if self.is_original else f"; --resume goes on from {self.folder.path}"
                self.say(f"stopped after step {step}{then}")
                break
        else:
            self.last(results)
        stop_request.training = False
        self._write(results)

    def share(self, indices: Sequence[int]) -> list[int]:
        """What of a batch this rank trains or evaluates."""
        return list(indices[self.rank // self.tp :: self.shares])

    def block(self) -> str:
        """What trains now; an original does not tell."""
        if isinstance(self.optimizer, BlockOptimizer):
            return "+".join(block.name for block in self.optimizer.active_blocks())
        return "original" if self.is_original else "all"

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        found: list[float] = summed.tolist()
        return found

    def scattered(self, values: Mapping[int, Sequence[float]], count: int, width: int) -> Tensor:
        """[count, width] values of all records on every rank.

        Args:
            values: by index of the record, those that this rank computed; an index out of range counts for nothing.
            count: of records.
            width: values of a record.
        """
        found = torch.zeros(count, width, dtype=torch.float64)
        for index, row in values.items():
            if index < count:
                found[index] = torch.tensor(row, dtype=torch.float64)
        # Ranks that divide a layer have the same records: the division by two, four, ... ranks is exact.
        return torch.tensor(self.total(found.flatten().tolist()), dtype=torch.float64).view(count, width) / self.tp

    def say(self, line: str) -> None:
        """Print on the first rank."""
        if self.rank == 0:
            tqdm.write(line)

    def save(self, tokenizer: Any) -> None:
        """Write the model and its tokenizer in Hugging Face's format."""
        folder = self.flags["output"] / "model"
        self.booster.save_model(self.boosted, str(folder), shard=True, use_safetensors=True)
        if self.rank == 0:
            tokenizer.save_pretrained(folder)

    def _step(self, step: int, block: str) -> tuple[float, float, bool]:
        """The mean loss of the ranks, the tokens of all of them, and whether one was asked to stop."""
        with self.figures.step(block):
            loss, tokens = self.backward(step)
            self.engine.step()
            self.engine.zero_grad()
            self.scheduler.step()
            value = loss.item()  # waits for all of the step on a device
        total, tokens_of_all, stops = self.total([value, tokens, stop_request.received])
        # A request that comes with the last step finds nothing to stop.
        return total / self.size, tokens_of_all / self.tp, stops > 0 and step < self.steps

    @torch.no_grad()
    def _evaluated(self) -> dict[str, float]:
        self.boosted.eval()
        found = self.evaluate()
        self.boosted.train()
        return found

    def _identity(self) -> dict[str, Any]:
        """The flags that a run keeps when it goes on."""
        return {name: str(value) for name, value in sorted(self.flags.items()) if name not in MESH}

    def _saved(self) -> Any:
        saved = self.folder.peek() if self.flags["resume"] else None
        if saved is None:
            return None
        theirs, ours = saved.extra["run"], self._identity()
        different = [
            f"--{name.replace('_', '-')} {theirs.get(name)} there, {value} here"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        if different:
            raise DataError(
                f"--resume: {self.folder.path} is of a run with other flags: {'; '.join(different)}. Give the same, or "
                "another --output."
            )
        return saved

    def _write(self, results: dict[str, Any]) -> None:
        """What is the same for every run of these flags goes to results.json, what is the machine's to figures.json."""
        figures = self.figures.found(None if self.is_original else formula_of(self.boosted, self.engine))
        if self.rank:
            return
        output: Path = self.flags["output"]
        output.mkdir(parents=True, exist_ok=True)
        results = {"run": self._identity(), **results}
        for name, values in (("results", results), ("figures", figures)):
            (output / f"{name}.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def batch_of(step: int, size: int, count: int, seed: int) -> list[int]:
    """Indices of the records of a step, counted from 1: every record once an epoch, in an order of the epoch."""
    found: list[int] = []
    for position in range((step - 1) * size, step * size):
        epoch, index = divmod(position, count)
        found.append(int(_order_of(epoch, count, seed)[index]))
    return found


@lru_cache(maxsize=1)
def _order_of(epoch: int, count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def _written(figures: Mapping[str, float]) -> str:
    return "held-out " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def entry(command: click.Command) -> int:
    """Run a command; wrong flags and data are one line, by the first rank, and end all ranks alike, with 2.

    Ctrl-C ends the run after the step, with a checkpoint, and with 130.
    """
    signal.signal(signal.SIGINT, stop_request)
    signal.signal(signal.SIGTERM, stop_request)
    try:
        command.main(standalone_mode=False)
    except (DataError, click.ClickException) as error:
        if os.environ.get("RANK", "0") == "0":
            told = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"Error: {told}", err=True)
        else:
            time.sleep(3)  # the launcher ends all ranks with the first one: let that one speak
        return 2
    except click.exceptions.Exit as error:
        return error.exit_code
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 130 if stop_request.received else 0
