"""Token ids of a corpus in files, which a killed program goes on with, and which training maps into memory.

    FOLDER/tokenizer/                what the ids mean, in Hugging Face's format
    FOLDER/train-00000.npy ...       [tokens] ids of whole documents, each with the end of text after it
    FOLDER/held_out-00000.npy ...    what is not trained on
    FOLDER/manifest.json             what the shards are of, and where in the corpus each of them ends

A shard is a function of the corpus and of where the one before it ends; it is written under another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from corpus import Source, Split, is_held_out, raw_documents, text_in
from numpy.typing import NDArray
from records import DataError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MANIFEST = "manifest.json"
BATCH = 2**20
"""Characters that are encoded at once."""
DEFAULTS: dict[str, Any] = {"text_field": "text", "vocabulary": 4096, "tokenizer_characters": 20_000_000}
"""What flags of pretokenize.py mean that are left out, and None in a manifest."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a corpus has been read.

    Attributes:
        file: index of the file that is being read.
        document: number of its last document that was read.
        before: digest of the names and sizes of the files before.
        within: digest of the documents of this one so far.
    """

    file: int = 0
    document: int = 0
    before: str = ""
    within: str = ""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What shards are made of.

    Attributes:
        sources: the files, by split.
        field: of a line's object that has its text.
        share: of the documents of the same files that is held out; None: each split has files of its own.
        skip_damaged: leave out what cannot be read, in the place of an error.
    """

    sources: Mapping[Split, Sequence[Source]]
    field: str
    share: float | None
    skip_damaged: bool

    def texts(self, split: Split, start: Position) -> Iterator[tuple[str | None, Position]]:
        """Texts of a split, each with the position after it; None: one that is left out.

        Raises:
            DataError: something cannot be read, or is not what had been read up to `start`.
        """
        files = hashlib.sha256()
        for index, source in enumerate(self.sources[split]):
            before = files.hexdigest()
            files.update(f"{source.name} {source.size} ".encode())
            if index == start.file and start.before not in ("", before):
                raise DataError(
                    f"the files before {source.path} are others than those that had been read. Give another --save_dir."
                )
            if index >= start.file:
                known = start if index == start.file else Position()
                yield from self._texts_of(split, source, index, before, known)

    def _texts_of(
        self, split: Split, source: Source, index: int, before: str, known: Position
    ) -> Iterator[tuple[str | None, Position]]:
        seen, within = hashlib.sha256(), ""
        for number, raw in self._documents(source):
            seen.update(raw or b"")
            if number <= known.document:
                within = seen.hexdigest()
                continue
            self._compare(source, known, within)
            # Of the other split, too: what is wrong is told before anything behind it has been made.
            text = None if raw is None else self._text(source, number, raw)
            if self.share is None or is_held_out(source, number, self.share) == (split == "held_out"):
                yield text, Position(file=index, document=number, before=before, within=seen.hexdigest())
        self._compare(source, known, within)

    def _compare(self, source: Source, known: Position, within: str) -> None:
        if within != known.within:
            raise DataError(
                f"{source.path}: got other documents up to number {known.document} than had been read. Give another "
                "--save_dir."
            )

    def _documents(self, source: Source) -> Iterator[tuple[int, bytes | None]]:
        """Documents of a file; None: one, or more, at its end that cannot be read and are left out."""
        number = 0
        try:
            for number, raw in raw_documents(source):
                yield number, raw
        except DataError:
            if not self.skip_damaged:
                raise
            yield number + 1, None

    def _text(self, source: Source, number: int, raw: bytes) -> str | None:
        try:
            return text_in(source, number, raw, self.field)
        except DataError:
            if not self.skip_damaged:
                raise
            return None


class Maker:
    """Makes the shards of a folder, and goes on with those that are there.

    Args:
        folder: where they are.
        corpus: of what they are.
        tokenizer: a fast one, with an end of text.
        identity: what else says which shards these are, by the name of the flag.
        shard_tokens: tokens after which a shard ends with the document.
        most: tokens of a split after which it ends with the document; None: all.
        progress: called with the tokens of each document.
    Raises:
        DataError: the folder has shards of something else.
    """

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        identity: Mapping[str, Any],
        *,
        shard_tokens: int,
        most: Mapping[Split, int | None],
        progress: Callable[[int], None],
    ) -> None:
        self._folder, self._corpus, self._tokenizer, self._progress = folder, corpus, tokenizer, progress
        self._shard_tokens, self._most = shard_tokens, most
        self._dtype = np.dtype("<u4" if len(tokenizer) > 2**16 else "<u2")
        wanted = {
            **identity,
            "shard_tokens": shard_tokens,
            "files": {split: _names_of(sources) for split, sources in corpus.sources.items()},
            "tokenizer": tokenizer_digest(tokenizer),
            "tokenizer_size": len(tokenizer),
        }
        self.manifest: dict[str, Any] = {"made_of": wanted, "train": _empty(), "held_out": _empty()}
        if (folder / MANIFEST).is_file():
            self.manifest = read_manifest(folder)
            there, here = _filled(self.manifest["made_of"]), _filled(wanted)
            different = [f"{key} {there.get(key)} there, {value} here" for key, value in here.items()
                         if there.get(key) != value]  # fmt: skip
            if different:
                raise DataError(
                    f"{folder} has shards of something else: {'; '.join(different)}. Give the same flags, or another "
                    "--save_dir."
                )

    def make(self) -> None:
        """Make what is missing or damaged.

        Raises:
            DataError: the corpus cannot be read, or has changed.
        """
        splits: tuple[Split, Split] = ("train", "held_out")
        for split in splits:
            self._mend(split)
            shards = self.manifest[split]["shards"]
            for ids, position, left_out in self._shards(split, len(shards)):
                if len(ids):
                    shards.append(self._write(split, len(shards), ids, position, left_out))
                else:
                    self.manifest[split]["left_out_at_end"] = left_out
                self._write_manifest()
            self.manifest[split]["complete"] = True
            self._write_manifest()

    def _mend(self, split: Split) -> None:
        """Make shards again that are in the manifest and not, or not whole, in the folder."""
        for index, shard in enumerate(self.manifest[split]["shards"]):
            ids = _mapped(self._folder / shard["name"], shard["tokens"])
            if ids is not None and _digest(ids) == shard["digest"]:
                continue
            again = next(self._shards(split, index), None)
            if again is None or self._write(split, index, *again) != shard:
                raise DataError(
                    f"{self._folder / shard['name']} is damaged, and the corpus gives other tokens now than then. Give "
                    "another --save_dir."
                )

    def _shards(self, split: Split, index: int) -> Iterator[tuple[NDArray[Any], Position, int]]:
        """Shards from one on: ids, where they end, and the number of documents that were left out.

        The last one is empty where all documents after the one before were left out.
        """
        before = self.manifest[split]["shards"][:index]
        start = Position(**before[-1]["ends"]) if before else Position()
        total, most = sum(shard["tokens"] for shard in before), self._most[split]
        if most is not None and total >= most:
            next(self._corpus.texts(split, start), None)  # reads up to there, to see that this is the same corpus
            return
        parts, position, tokens, left_out = list[NDArray[Any]](), start, 0, 0
        for ids, position in self._encoded(split, start):
            if ids is None:
                left_out += 1
                continue
            parts.append(ids)
            tokens += len(ids)
            self._progress(len(ids))
            full = most is not None and total + tokens >= most
            if full or tokens >= self._shard_tokens:
                yield np.concatenate(parts), position, left_out
                total, parts, tokens, left_out = total + tokens, [], 0, 0
            if full:
                return
        if parts or left_out:
            yield np.concatenate([np.empty(0, self._dtype), *parts]), position, left_out

    def _encoded(self, split: Split, start: Position) -> Iterator[tuple[NDArray[Any] | None, Position]]:
        batch, characters = list[tuple[str | None, Position]](), 0
        for text, position in self._corpus.texts(split, start):
            batch.append((text, position))
            characters += len(text or "")
            if characters >= BATCH:
                yield from self._ids(batch)
                batch, characters = [], 0
        yield from self._ids(batch)

    def _ids(self, batch: list[tuple[str | None, Position]]) -> Iterator[tuple[NDArray[Any] | None, Position]]:
        texts = [text for text, _ in batch if text is not None]
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        found = iter(self._tokenizer(texts, **options)["input_ids"] if texts else [])
        for text, position in batch:
            ids = None if text is None else np.array([*next(found), self._tokenizer.eos_token_id], self._dtype)
            yield ids, position

    def _write(self, split: Split, index: int, ids: NDArray[Any], position: Position, left_out: int) -> dict[str, Any]:
        name = f"{split}-{index:05}.npy"
        with _replaced(self._folder / name) as file:
            np.save(file, ids)
        return {
            "name": name, "tokens": len(ids), "digest": _digest(ids), "left_out": left_out, "ends": asdict(position),
        }  # fmt: skip

    def _write_manifest(self) -> None:
        with _replaced(self._folder / MANIFEST) as file:
            file.write(json.dumps(self.manifest, indent=1).encode())


class Tokens:
    """[length] ids at a time, of all shards of a split.  What is left of a shard after the last such row is not used.

    Args:
        folder: that `Maker` made.
        split: which.
        length: tokens of a row.
    Raises:
        DataError: a shard is missing or cut, shards are still to be made, or there are too few tokens.
    """

    def __init__(self, folder: Path, split: Split, length: int) -> None:
        manifest = read_manifest(folder)
        if not manifest[split]["complete"]:
            raise DataError(f"{folder}: not all shards have been made. Give the command of pretokenize.py again.")
        self._shards = []
        for shard in manifest[split]["shards"]:
            ids = _mapped(folder / shard["name"], shard["tokens"])
            if ids is None:
                raise DataError(
                    f"{folder / shard['name']}: expected {shard['tokens']} tokens, got a file that is missing or cut. "
                    "Give the command of pretokenize.py again: it makes this one anew."
                )
            self._shards.append(ids)
        self._length = length
        self._ends = list(accumulate(len(ids) // length for ids in self._shards))
        if not len(self):
            raise DataError(
                f"{folder}: got no {split} shard of {length} tokens. Give a smaller --max_length, or pretokenize.py a "
                "larger corpus or another --held_out_share."
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, indices: Sequence[int]) -> Tensor:
        """[rows, length] ids."""
        return torch.stack([self._row(index) for index in indices])

    def _row(self, index: int) -> Tensor:
        shard = bisect_right(self._ends, index)
        at = (index - (self._ends[shard - 1] if shard else 0)) * self._length
        return torch.from_numpy(self._shards[shard][at : at + self._length].astype(np.int64))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        DataError: it has none, or a damaged one.
    """
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for split in ("train", "held_out"):
            _ = found[split]["complete"], found[split]["left_out_at_end"]
            for shard in found[split]["shards"]:
                _ = shard["name"], shard["tokens"], shard["digest"], shard["left_out"], Position(**shard["ends"])
        _ = found["made_of"]["tokenizer_size"]
    except OSError:
        raise DataError(f"{path}: got no such file, expected one of pretokenize.py. Run that first.") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged. Delete it and give the command of pretokenize.py again.") from None
    return found


def digest_of(manifest: Mapping[str, Any]) -> str:
    """What is the same for shards of the same tokens."""
    digests = [shard["digest"] for split in ("train", "held_out") for shard in manifest[split]["shards"]]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def tokenizer_at(path: Path, remedy: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory.

    Raises:
        DataError: it has none; the remedy is told.
    """
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of damaged files transformers raises whatever it meets there
        told = str(error).partition("\n")[0]
        raise DataError(
            f"{path}: got no tokenizer there ({told}), expected a directory of Hugging Face's format. {remedy}"
        ) from None


def tokenizer_digest(tokenizer: Any) -> str:
    """What is the same for tokenizers that make the same ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


@contextmanager
def _replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name when it is complete and on the disk, and not before."""
    aside = path.with_name(f"{path.name}.part")
    with aside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _mapped(path: Path, tokens: int) -> NDArray[Any] | None:
    """The ids of a shard; None: it is not there, or not whole."""
    try:
        ids: NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return ids if ids.shape == (tokens,) else None


def _names_of(sources: Sequence[Source]) -> str:
    names = hashlib.sha256("".join(source.name for source in sources).encode()).hexdigest()[:12]
    return f"{len(sources)} ({names})"


def _filled(made_of: Mapping[str, Any]) -> dict[str, Any]:
    return {**made_of, **{flag: value for flag, value in DEFAULTS.items() if made_of.get(flag) is None}}


def _digest(ids: NDArray[Any]) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()


def _empty() -> dict[str, Any]:
    return {"shards": [], "left_out_at_end": 0, "complete": False}
