"""Alpaca's records as token ids, with the loss on answers alone.  T: tokens of the longest sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from docstrings import is_held_out, pairs
from records import DataError, objects_of, text_of, without_every_tenth
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of what has no loss, as transformers has it."""


@dataclass(frozen=True)
class Answers:
    """Prompts and answers as token ids."""

    prompts: list[list[int]]
    answers: list[list[int]]
    length: int
    """T"""
    padding: int
    """Id of what follows a sequence that is shorter than others."""

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """[sequences, T] ids and labels; prompts and padding have no loss, and padding is never looked back at."""
        ids, labels = [], []
        for index in indices:
            prompt, answer = self.prompts[index], self.answers[index]
            rest = self.length - len(prompt) - len(answer)
            ids.append([*prompt, *answer, *[self.padding] * rest])
            labels.append([*[IGNORED] * len(prompt), *answer, *[IGNORED] * rest])
        return torch.tensor(ids), torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.prompts)


def read_records(path: Path | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records to train on, and held-out ones: whole modules of docstrings, or every tenth line of a file.

    Args:
        path: a file of JSON lines with `instruction`, `output` and maybe `input`; None: docstrings.
    Raises:
        DataError: a line is no such record, or there are fewer than ten.
    """
    if path is None:
        found = list(pairs())
        return (
            [record for record in found if not is_held_out(record["module"])],
            [record for record in found if is_held_out(record["module"])],
        )
    found = []
    for where, record in objects_of(path):
        for field in ("instruction", "output"):
            text_of(where, record, field, "Alpaca's fields: instruction, output, and maybe input")
        found.append(record)
    if len(found) < 10:
        raise DataError(f"{path}: got {len(found)} records, expected ten or more, of which every tenth is held out.")
    return without_every_tenth(found)


def prompt_of(record: dict[str, Any]) -> str:
    """What the user says."""
    return f"{record['instruction']}\n\n{record['input']}" if record.get("input") else str(record["instruction"])


def encode(records: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int) -> Answers:
    """Apply the tokenizer's chat template; what is longer than `length` tokens is left out.

    Raises:
        DataError: the tokenizer has no chat template, or nothing is short enough.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the model's tokenizer has no chat template, expected one, as of models for chat. Take an instruct model, "
            "or write one into tokenizer_config.json."
        )
    prompts, answers = [], []
    for record in records:
        said = [{"role": "user", "content": prompt_of(record)}]
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        said.append({"role": "assistant", "content": record["output"]})
        whole = str(tokenizer.apply_chat_template(said, tokenize=False))
        if not whole.startswith(str(prompt)):
            raise DataError("the model's chat template writes another prompt before an answer than alone. Mend it.")
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(str(prompt)) :])]
        if len(ids[0]) + len(ids[1]) <= length:
            prompts.append(ids[0])
            answers.append(ids[1])
    if not prompts:
        raise DataError(f"no record has {length} tokens or fewer. Raise --length.")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Answers(prompts, answers, length, padding)
