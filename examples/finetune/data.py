"""Text, tokenizer and batches.  T: tokens in a sequence; batches are a pure function of (seed, step)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

NUM_PIECES = 40
HELD_OUT_EVERY = 10
END_OF_TEXT = "<|endoftext|>"


def read_paragraphs(path: Path | None = None) -> list[str]:
    """Paragraphs of a .txt file (separated by blank lines) or a .jsonl file ("text" fields).

    Without a file: the language reference that ships with CPython.  Its topics overlap, so each paragraph is kept
    once; otherwise text held out would also be trained on.

    Raises:
        ValueError: a line of a .jsonl file is not an object with a "text" string.
    """
    if path is None:
        paragraphs = [_without_markup(paragraph) for topic in topics.values() for paragraph in topic.split("\n\n")]
        return [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph]
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return list(_jsonl_texts(content, path.name))
    return [paragraph.strip() for paragraph in content.split("\n\n") if paragraph.strip()]


def _without_markup(paragraph: str) -> str:
    """One line of prose: no underlines of headings, no grammar rules, no line breaks."""
    lines = [line for line in paragraph.splitlines() if re.search(r"\w", line) and "::=" not in line]
    return " ".join(" ".join(lines).split())


def _jsonl_texts(content: str, name: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'{name}, line {number}: got {line[:60]!r}, expected an object with a "text" string')
        yield text


def split_paragraphs(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    """Train and held-out texts: contiguous pieces of equal length, every tenth piece held out."""
    total = sum(map(len, paragraphs))
    pieces: list[list[str]] = [[] for _ in range(NUM_PIECES)]
    position = 0
    for paragraph in paragraphs:
        pieces[position * NUM_PIECES // max(total, 1)].append(paragraph)
        position += len(paragraph)
    texts = ["\n".join(piece) for piece in pieces if piece]
    held_out = set(range(HELD_OUT_EVERY // 2, len(texts), HELD_OUT_EVERY))
    train = [text for index, text in enumerate(texts) if index not in held_out]
    return train, [texts[index] for index in sorted(held_out)]


def train_tokenizer(kind: str, vocab_size: int, texts: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on `texts`, or ("byte") the 256 bytes alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 if kind == "byte" else vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids on the CPU."""

    train: Tensor
    """[tokens] the training pieces one after the other."""
    held_out: Tensor
    """[sequences, T]"""
    tokenizer: PreTrainedTokenizerBase

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        """[size, T] random windows of the training text: the same for every mesh and any number of ranks."""
        length = self.held_out.shape[1]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - length + 1, (size,), generator=generator)
        return self.train[starts[:, None] + torch.arange(length)]


def load_corpus(
    text: Path | None, model: Path | None, kind: str, vocab_size: int, sequence_length: int, held_out_batch: int
) -> Corpus:
    """Read, split and tokenize.

    Args:
        text: a .txt or .jsonl file; None is the text that ships with CPython.
        model: a local model directory whose tokenizer is used; None trains one.
        kind: "bpe" or "byte".
        vocab_size: of the trained BPE.
        sequence_length: T.
        held_out_batch: the number of held-out sequences is a multiple of it, so that ranks share them equally.

    Raises:
        ValueError: the text is too short for that.
    """
    train_texts, held_out_texts = split_paragraphs(read_paragraphs(text))
    if model is None:
        tokenizer = train_tokenizer(kind, vocab_size, train_texts)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
    train, held_out = (_encode(tokenizer, texts) for texts in (train_texts, held_out_texts))
    count = len(held_out) // sequence_length // held_out_batch * held_out_batch
    if count == 0 or len(train) < sequence_length:
        raise ValueError(
            f"the text gives {len(train)} training and {len(held_out)} held-out tokens, expected at least "
            f"{sequence_length} and {held_out_batch * sequence_length}. Use a longer text or a smaller batch."
        )
    held_out = held_out[: count * sequence_length].view(count, sequence_length)
    return Corpus(train=train, held_out=held_out, tokenizer=tokenizer)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end for text in texts]
    return torch.tensor([token for piece in ids for token in piece], dtype=torch.long)
