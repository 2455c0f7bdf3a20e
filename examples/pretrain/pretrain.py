"""Pretraining of a Llama on the shards of pretokenize.py, by any method and plugin, with the flags of GoLore's program.

    python examples/pretrain/pretokenize.py --corpus installed --save_dir tokens
    colossalai run --nproc_per_node 2 examples/pretrain/pretrain.py --dataset_path tokens --model_config llama_9m \
        --batch_size 8 --total_batch_size 16 --max_length 128 --lr 3e-3 --num_training_steps 2000      # or: torchrun

T: tokens of a row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from figures import perplexity
from methods import PROJECTED, Options, optimizer_of, or_else, refuse_flags
from presets import PRESETS, config_of
from pretrained import DTYPES
from records import DataError
from shards import Tokens, digest_of, read_manifest, tokenizer_at
from transformers import AutoModelForCausalLM
from tuning import CONTEXT, Run, batch_of, entry, launch, tensor_parallel

METHODS = {
    "adamw": "adamw", "galore_adamw": "galore", "golore_adamw": "golore", "sgd": "sgd", "galore_sgd": "galore-sgd",
    "golore_sgd": "golore-sgd", "adafactor": "adafactor", "came": "came", "lamb": "lamb",
}  # fmt: skip
"""What examples/tuning calls an optimizer."""
LOW_RANK = tuple(name for name, method in METHODS.items() if method in PROJECTED)
RANDOM = ("golore_adamw", "golore_sgd")
ONLY = {
    "rank": LOW_RANK, "update_proj_gap": LOW_RANK, "galore_scale": LOW_RANK, "rand_ratio": RANDOM,
    "momentum": ("sgd", "galore_sgd", "golore_sgd"),
}  # fmt: skip
"""Flags that some optimizers alone have."""
PRECISIONS = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64", **{name: name for name in DTYPES}}
OTHERWISE = {"batch_size", "single_gpu", "dtype", "use_peft", "golore", "eval_tokens"}
"""Flags that say how a run is made, or that are kept as another one."""
FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT, SHARE = click.IntRange(1), click.FloatRange(0, 1)


@click.command(context_settings=CONTEXT)
@click.option("--dataset_path", type=FOLDER, required=True, help="Folder of pretokenize.py.")
@click.option("--base_dir", expose_value=False, hidden=True, callback=lambda *given: refuse_base_dir(given[-1]))
@click.option("--model_config", default="llama_60m", help=f"{', '.join(PRESETS)}, or a file of Hugging Face's format.")
@click.option("--optimizer", type=click.Choice(list(METHODS)), default="adamw")
@click.option("--Golore", "golore", is_flag=True, help="The optimizer in GoLore's form: golore_adamw, golore_sgd.")
@click.option("--use_peft", type=bool, default=False, help="Goes with --Golore, as in the paper's command.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), required=True)
@click.option("--weight_decay", type=click.FloatRange(0), default=0.0)
@click.option("--momentum", type=SHARE, help="[default: 0.9]")
@click.option("--rank", type=COUNT, help="Of projections.  [default: 128]")
@click.option("--update_proj_gap", type=COUNT, help="Steps between refreshes.  [default: 200]")
@click.option("--galore_scale", "--scale", "galore_scale", type=click.FloatRange(0), help="[default: 0.25]")
@click.option("--rand_ratio", type=SHARE, help="Part of the run before random bases.  [default: 0.8]")
@click.option("--batch_size", type=COUNT, required=True, help="Rows of a backward pass of one rank.")
@click.option("--total_batch_size", type=COUNT, help="Rows of a step.  [default: a backward pass of each rank]")
@click.option("--max_length", type=click.IntRange(2), default=256, help="T, tokens of a row.")
@click.option("--num_training_steps", type=COUNT, default=10000)
@click.option("--warmup_steps", type=click.IntRange(0), default=1000, help="Of each cycle.")
@click.option("--cycle_length", type=COUNT, help="Steps after which the rate restarts.  [default: all]")
@click.option("--min_lr_ratio", type=SHARE, default=0.1, help="Of the rate, at the end of a cycle.")
@click.option("--eval_every", type=COUNT, default=500)
@click.option("--eval_tokens", type=COUNT, default=10_000_000, help="Held-out tokens at most.")
@click.option("--save_every", "checkpoint_every", type=COUNT, default=1000, help="Steps between checkpoints.")
@click.option("--save_dir", "--output", "output", type=FOLDER, default=Path("pretrain"))
@click.option("--autoresume", "--resume", "resume", type=bool, is_flag=False, flag_value=True, default=False,
              help="Go on from the newest checkpoint, if there is one, on any number of ranks.")  # fmt: skip
@click.option("--save", is_flag=True, help="Write the trained model to SAVE_DIR/model.")
@click.option("--tags", help="Name of the run in tables.  [default: the optimizer]")
@click.option("--dtype", type=click.Choice(list(PRECISIONS)), default="bfloat16")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, the order of rows and the method.")
@click.option("--single_gpu", is_flag=True, help="Refuse to run on more than one rank.")
@click.option("--plugin", type=click.Choice(["zero", "hybrid", "fsdp"]), default="zero")
@click.option("--tp", type=COUNT, default=1, help="Tensor-parallel ranks (hybrid).")
def main(**flags: Any) -> None:
    """Train a model from random weights; results go to SAVE_DIR/results.json, checkpoints beside it."""
    Pretrain(**flags).train()


class Pretrain(Run):
    """One rank of a run."""

    def __init__(self, **flags: Any) -> None:
        flags["optimizer"] = name_of(flags)
        flags["precision"] = PRECISIONS[flags["dtype"]]
        steps, folder, length = flags["num_training_steps"], flags["dataset_path"], flags["max_length"]
        factor, manifest = factor_of(flags), read_manifest(folder)
        config = config_of(flags["model_config"], manifest["made_of"]["tokenizer_size"], length)
        self.train_rows, self.held_out = Tokens(folder, "train", length), Tokens(folder, "held_out", length)
        if flags["save"]:
            remedy = "--save goes with it: give the command of pretokenize.py again, which makes it anew."
            self.tokenizer = tokenizer_at(folder / "tokenizer", remedy)
        launch()  # not before, so that wrong data are told at once
        if flags["single_gpu"] and dist.get_world_size() > 1:
            raise DataError(f"--single_gpu: got {dist.get_world_size()} ranks. Start one, or leave it out.")
        self.micro = flags["batch_size"]
        shares = dist.get_world_size() // tensor_parallel(flags)
        self.batch = flags["total_batch_size"] or self.micro * shares
        require_divisible(self.batch, self.micro, shares)
        self.eval_rows = min(flags["eval_tokens"] // length, len(self.held_out))
        if not self.eval_rows:
            raise DataError(f"--eval_tokens {flags['eval_tokens']} are no row of {length}. Give more.")
        torch.manual_seed(flags["seed"])  # the same weights on every rank and for every method
        model = AutoModelForCausalLM.from_config(config).to(DTYPES[flags["precision"]])
        kept = {name: value for name, value in flags.items() if name not in OTHERWISE}
        kept |= {"total_batch_size": self.batch, "eval_rows": self.eval_rows, "dataset_path": digest_of(manifest)}
        super().__init__(
            kept,
            model,
            optimizer_of(METHODS[flags["optimizer"]], model, options_of(flags)),
            steps=steps,
            batch=self.batch,
            eval_every=flags["eval_every"],
            factor=factor,
        )
        self.counts = counts_of(model)

    def first(self) -> dict[str, Any]:
        """And the number of weights."""
        self.say(", ".join(f"{name} {value:,}" for name, value in self.counts.items()))
        return {**super().first(), "counts": self.counts}

    def last(self, results: dict[str, Any]) -> None:
        if self.flags["save"]:
            self.save(self.tokenizer)

    def backward(self, step: int) -> tuple[Tensor, int]:
        """As many backward passes as the rows of a step take."""
        rows = self.share(batch_of(step, self.batch, len(self.train_rows), self.flags["seed"]))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(rows), self.micro):
            ids = self.train_rows.rows(rows[start : start + self.micro])
            loss = self.losses(ids).sum() / len(rows)
            self.booster.backward(loss, self.engine)
            total += loss.detach()
        return total, len(rows) * self.flags["max_length"]

    def losses(self, ids: Tensor) -> Tensor:
        """[rows] mean losses of the tokens of [rows, T] but the first ones, which nothing predicts."""
        ids = ids.to(self.device)
        logits = self.boosted(input_ids=ids).logits[:, :-1]
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return functional.cross_entropy(wide.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    def evaluate(self) -> dict[str, float]:
        """Mean loss of a held-out token."""
        total, width = torch.zeros((), dtype=torch.float64, device=self.device), self.micro * self.shares
        # Every rank makes as many passes; the last ones may repeat rows, which then do not count.
        for start in range(0, self.eval_rows, width):
            indices = self.share(range(start, start + width))
            losses = self.losses(self.held_out.rows([index % self.eval_rows for index in indices]))
            total += losses[: sum(index < self.eval_rows for index in indices)].double().sum()
        loss = self.total([total.item()])[0] / self.tp / self.eval_rows
        return {"loss": loss, "perplexity": perplexity(loss)}


def refuse_base_dir(value: str | None) -> None:
    """Say where held-out text comes from here.

    Raises:
        DataError: the flag was given.
    """
    if value is not None:
        raise DataError("--base_dir: held-out tokens are in --dataset_path, too. Leave it out.")


def name_of(flags: dict[str, Any]) -> str:
    """The optimizer that the flags ask for.

    Raises:
        DataError: they ask for what there is not, or for what the optimizer does not have.
    """
    name = str(flags["optimizer"])
    if flags["golore"]:
        if f"golore_{name}" not in METHODS:
            raise DataError(f"--Golore is about adamw and sgd, got --optimizer {name}. Leave it out.")
        name = f"golore_{name}"
    elif flags["use_peft"]:
        raise DataError("--use_peft goes with --Golore, and there is no other form here. Give both, or none.")
    refuse_flags(name, flags, ONLY, METHODS)
    return name


def options_of(flags: dict[str, Any]) -> Options:
    """Hyper-parameters, with the values of the papers' programs where a flag is left out."""
    given = partial(or_else, flags)
    return Options(
        lr=flags["lr"],
        steps=flags["num_training_steps"],
        period=given("update_proj_gap", 200),
        rank=given("rank", 128),
        scale=given("galore_scale", 0.25),
        rand_ratio=given("rand_ratio", 0.8),
        momentum=given("momentum", 0.9),
        weight_decay=flags["weight_decay"],
        seed=flags["seed"],
    )


def factor_of(flags: dict[str, Any]) -> Callable[[int], float]:
    """The factor of the learning rate, by steps taken.

    Raises:
        DataError: the cycles do not fit the run, or the warm-up a cycle.
    """
    steps, warmup = flags["num_training_steps"], flags["warmup_steps"]
    cycle = flags["cycle_length"] or steps
    if steps % cycle:
        raise DataError(
            f"--num_training_steps {steps} is no multiple of --cycle_length {cycle}, and the run would end within a "
            f"cycle. Give {steps - steps % cycle or cycle} steps, or another length."
        )
    if warmup >= cycle:
        raise DataError(f"--warmup_steps {warmup} take the whole cycle of {cycle} steps. Give fewer.")
    return partial(cosine, warmup, cycle, flags["min_lr_ratio"])


def cosine(warmup: int, cycle: int, lowest: float, step: int) -> float:
    """Factor of the learning rate: in each cycle up over the first steps, then half a cosine down to the lowest."""
    at = step % cycle
    if at < warmup:
        return (at + 1) / warmup
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * (at - warmup) / (cycle - warmup))) / 2


def require_divisible(total: int, micro: int, shares: int) -> None:
    """Require whole backward passes on every rank.

    Raises:
        DataError: the rows of a step are no such multiple.
    """
    unit = micro * shares
    if total % unit:
        near = " or ".join(str(each) for each in (total - total % unit, total - total % unit + unit) if each)
        raise DataError(
            f"--total_batch_size {total} is no multiple of --batch_size {micro} on {shares} ranks, {unit}. Give "
            f"{near}, or another --batch_size."
        )


def counts_of(model: Any) -> dict[str, int]:
    """Numbers of weights."""
    every = {name: param.numel() for name, param in model.named_parameters()}
    outside = sum(count for name, count in every.items() if "embed_tokens" in name or "lm_head" in name)
    return {"weights": sum(every.values()), "weights of the layers": sum(every.values()) - outside}


if __name__ == "__main__":
    sys.exit(entry(main))
