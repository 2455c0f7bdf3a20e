"""Token ids of a corpus, for pretrain.py; killed at any moment, the same command goes on and leaves the same bytes.

python examples/pretrain/pretokenize.py --corpus installed --save_dir tokens        # the installed packages' texts
python examples/pretrain/pretokenize.py --corpus c4/en --tokenizer t5-base --save_dir tokens
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from corpus import LINES, Split, installed, sources_of
from interrupt import stop_request
from records import DataError
from shards import MANIFEST, Corpus, Maker, Position
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from tuning import CONTEXT, entry

END_OF_TEXT = "</s>"
PATH = click.Path(path_type=Path)


@click.command(context_settings=CONTEXT)
@click.option("--corpus", multiple=True, required=True, help="Files or directories, or `installed`.")
@click.option("--held_out", multiple=True, type=PATH, help="Files that are held out, in the place of a share.")
@click.option("--held_out_share", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="[default: 0.01]")
@click.option("--text_field", help="Of a line's object.  [default: text]")
@click.option("--tokenizer", type=PATH, help="Local directory of Hugging Face's format.")
@click.option("--vocabulary", type=click.IntRange(300), help="Of the BPE trained here otherwise.  [default: 4096]")
@click.option("--tokenizer_characters", type=click.IntRange(1), help="It is trained on.  [default: 20,000,000]")
@click.option("--tokens", type=click.IntRange(1), help="To train on at most, to the end of a document.")
@click.option("--held_out_tokens", type=click.IntRange(1), help="At most.")
@click.option("--shard_tokens", type=click.IntRange(1), default=2**24, help="At least, to the end of a document.")
@click.option("--skip-damaged", is_flag=True, help="Leave out what cannot be read, and say how much that is.")
@click.option("--save_dir", type=click.Path(path_type=Path, file_okay=False), default=Path("tokens"))
def main(**flags: Any) -> None:
    """Make shards of token ids in SAVE_DIR."""
    try:
        say_made(flags["save_dir"], pretokenize(flags))
    except KeyboardInterrupt:
        click.echo(f"stopped; the same command goes on in {flags['save_dir']}")


def pretokenize(flags: dict[str, Any]) -> dict[str, Any]:
    """Make the shards that the flags ask for.

    Returns:
        Their manifest.
    Raises:
        DataError: flags go not together, something cannot be read, or the folder has shards of something else.
        KeyboardInterrupt: a signal came.
    """
    folder, corpus = flags["save_dir"], corpus_of(flags)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(flags, corpus)
    # The bar is for people: it stays away from files.
    with tqdm(unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:

        def progress(tokens: int) -> None:
            bar.update(tokens)
            if stop_request.received:
                raise KeyboardInterrupt

        names = ("text_field", "vocabulary", "tokenizer_characters", "tokens", "held_out_tokens")
        identity = {**{name: flags[name] for name in names}, "held_out_share": corpus.share}
        most: dict[Split, int | None] = {"train": flags["tokens"], "held_out": flags["held_out_tokens"]}
        shard_tokens = flags["shard_tokens"]
        maker = Maker(folder, corpus, tokenizer, identity, shard_tokens=shard_tokens, most=most, progress=progress)
        stop_request.training = True
        try:
            maker.make()
        finally:
            stop_request.training = False
    return maker.manifest


def corpus_of(flags: dict[str, Any]) -> Corpus:
    """The corpus that the flags name.

    Raises:
        DataError: they go not together, or a file is missing.
    """
    names, held_out, share = flags["corpus"], flags["held_out"], flags["held_out_share"]
    if held_out and share is not None:
        raise DataError("--held_out and --held_out_share say both what is held out. Give one.")
    if "installed" in names and (len(names) > 1 or held_out):
        raise DataError("--corpus installed goes alone, without others and --held_out. Leave them out.")
    if flags["tokenizer"] and (flags["vocabulary"] or flags["tokenizer_characters"]):
        raise DataError(
            "--vocabulary and --tokenizer_characters are about a tokenizer that is trained here, got --tokenizer. "
            "Leave them out."
        )
    alone = names == ("installed",)
    sources = installed() if alone else sources_of([Path(name) for name in names])
    evaluated = sources_of(held_out) if held_out else sources
    if flags["text_field"] and not any(source.name.endswith(LINES) for source in (*sources, *evaluated)):
        raise DataError(f"--text_field is about {', '.join(LINES)}, and no file is one. Leave it out.")
    return Corpus(
        sources={"train": sources, "held_out": evaluated},
        field=flags["text_field"] or "text",
        share=None if held_out else share or 0.01,
        # Packages have files that are meant to be wrong.
        skip_damaged=flags["skip_damaged"] or alone,
    )


def tokenizer_of(flags: dict[str, Any], corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer of the shards, which is in their folder, too.

    Raises:
        DataError: the directory has none that is fast and knows an end of text.
    """
    there = flags["save_dir"] / "tokenizer"
    begun = (flags["save_dir"] / MANIFEST).is_file()
    given = flags["tokenizer"] or (there if begun else None)
    found = _loaded(given) if given else trained(corpus, flags["vocabulary"] or 4096, flags["tokenizer_characters"])
    if not begun:
        # Of a run that was killed before its first shard; this one may have other flags.
        shutil.rmtree(there, ignore_errors=True)
        found.save_pretrained(there)
    return found


def trained(corpus: Corpus, vocabulary: int, characters: int | None) -> PreTrainedTokenizerBase:
    """A byte-level BPE of the first documents to train on.

    Args:
        corpus: whose.
        vocabulary: tokens at most.
        characters: of the documents at least, if there are as many; None: 20 million.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_first(corpus, characters or 20_000_000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def say_made(folder: Path, manifest: dict[str, Any]) -> None:
    """Print what has been made, and what was left out."""
    for split in ("train", "held_out"):
        shards = manifest[split]["shards"]
        tokens = sum(shard["tokens"] for shard in shards)
        left_out = manifest[split]["left_out_at_end"] + sum(shard["left_out"] for shard in shards)
        click.echo(f"{folder}: {split} {tokens:,} tokens in {len(shards)} shards; {left_out} documents left out")


def _first(corpus: Corpus, characters: int) -> Iterator[str]:
    texts = (text for text, _ in corpus.texts("train", Position()) if text is not None)
    while characters > 0 and (batch := list(islice(texts, 1))):
        characters -= len(batch[0])
        yield batch[0]


def _loaded(path: Path) -> PreTrainedTokenizerBase:
    try:
        found = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: got no tokenizer there ({str(error).splitlines()[0]}), expected a directory of Hugging Face's "
            "format. Nothing is downloaded here: give the directory of one that is on this machine."
        ) from None
    if not found.is_fast or found.eos_token_id is None:
        raise DataError(f"{path}: expected a fast tokenizer (tokenizer.json) that has an end of text. Give another.")
    return found


if __name__ == "__main__":
    sys.exit(entry(main))
