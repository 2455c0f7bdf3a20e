"""Token ids of a corpus, for pretrain.py; killed at any moment, the same command goes on and leaves the same bytes.

python examples/pretrain/pretokenize.py --corpus installed --save_dir tokens        # the installed packages' texts
python examples/pretrain/pretokenize.py --corpus c4/en --tokenizer t5-base --save_dir tokens
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from corpus import LINES, Split, installed, sources_of
from interrupt import stop_request
from records import DataError
from shards import DEFAULTS, MANIFEST, Corpus, Maker, Position, tokenizer_at, tokenizer_digest
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
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
        DataError: flags go not together, something cannot be read, there is too little text, or the folder has shards
            or a tokenizer of something else.
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
        if not (folder / MANIFEST).is_file():
            require_texts(corpus)
        stop_request.training = True
        try:
            keep(tokenizer, folder / "tokenizer")
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
    if held_out:
        apart = {source.path.resolve() for source in evaluated}
        sources = [source for source in sources if source.path.resolve() not in apart]
        if not sources:
            raise DataError("--held_out has every file of --corpus, and none is left to train on. Give other ones.")
    if flags["text_field"] and not any(source.name.endswith(LINES) for source in (*sources, *evaluated)):
        raise DataError(f"--text_field is about {', '.join(LINES)}, and no file is one. Leave it out.")
    return Corpus(
        sources={"train": sources, "held_out": evaluated},
        field=flags["text_field"] or DEFAULTS["text_field"],
        share=None if held_out else share or 0.01,
        # Packages have files that are meant to be wrong.
        skip_damaged=flags["skip_damaged"] or alone,
    )


def require_texts(corpus: Corpus) -> None:
    """Require text in both splits; reads to the first one of each.

    Raises:
        DataError: one has none.
    """
    purposes: dict[Split, str] = {"train": "to train on", "held_out": "to hold out"}
    empty = [
        purpose for split, purpose in purposes.items() if not any(text for text, _ in corpus.texts(split, Position()))
    ]
    if empty:
        share = "" if corpus.share is None else f"another --held_out_share than {corpus.share}, "
        raise DataError(
            f"--corpus: got no text {' and none '.join(empty)}, it is empty or too small. Give a larger one, {share}or "
            "other files to --held_out."
        )


def tokenizer_of(flags: dict[str, Any], corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer of the shards, which is in their folder, too.

    Raises:
        DataError: the directory has none that is fast and knows an end of text.
    """
    folder: Path = flags["save_dir"]
    begun = (folder / MANIFEST).is_file() and (folder / "tokenizer" / "tokenizer.json").is_file()
    given = flags["tokenizer"] or (folder / "tokenizer" if begun else None)
    if given is None:
        return trained(corpus, flags["vocabulary"], flags["tokenizer_characters"])
    found = tokenizer_at(given, "Nothing is downloaded here: give the directory of one that is on this machine.")
    if not found.is_fast or found.eos_token_id is None:
        raise DataError(f"{given}: expected a fast tokenizer (tokenizer.json) that has an end of text. Give another.")
    return found


def keep(tokenizer: PreTrainedTokenizerBase, there: Path) -> None:
    """Write a tokenizer, whole or not at all, unless it is there.

    Raises:
        DataError: something else is there.
    """
    with TemporaryDirectory(dir=there.parent, prefix="tokenizer-") as aside:
        made = Path(aside) / "tokenizer"
        tokenizer.save_pretrained(made)
        try:
            made.rename(there)  # which is refused where anything is, but for an empty folder
        except OSError:
            if not _is_same(there, made):
                raise DataError(
                    f"{there} is there, and is not the tokenizer that these flags ask for. Move it away, or give "
                    "another --save_dir."
                ) from None


def trained(corpus: Corpus, vocabulary: int | None, characters: int | None) -> PreTrainedTokenizerBase:
    """A byte-level BPE of the first documents to train on.

    Args:
        corpus: whose.
        vocabulary: tokens at most; None: as of `DEFAULTS`.
        characters: of the documents at least, if there are as many; None: as of `DEFAULTS`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary or DEFAULTS["vocabulary"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_first(corpus, characters or DEFAULTS["tokenizer_characters"]), trainer)
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


def _is_same(there: Path, made: Path) -> bool:
    try:
        found = tokenizer_at(there, "")
    except DataError:
        return False
    return bool(found.is_fast) and tokenizer_digest(found) == tokenizer_digest(tokenizer_at(made, ""))


if __name__ == "__main__":
    sys.exit(entry(main))
