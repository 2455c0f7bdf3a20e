"""Shards of token ids: what is in them, made anew after any interruption, and what is said of wrong files."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretokenize
import pytest
import shards
import torch
from corpus import installed, is_held_out, sources_of
from interrupt import stop_request
from pretokenize import main
from records import DataError
from shards import Tokens
from transformers import AutoTokenizer
from tuning import entry

END = "</s>"
SMALL = ["--vocabulary", "300", "--tokenizer_characters", "500"]


@pytest.fixture(autouse=True)
def short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that shards are written before all is read."""
    monkeypatch.setattr(shards, "BATCH", 1000)


def texts(number: int, seed: int = 0) -> list[str]:
    words = ["one", "two", "three", "four", "ünicode", "line\nbreak"]
    draw = torch.Generator().manual_seed(seed)
    return [" ".join(words[at] for at in torch.randint(6, (12,), generator=draw)) + f" {n}" for n in range(number)]


def lines(found: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "url": "none"}) + "\n" for text in found).encode()


def corpus(folder: Path) -> Path:
    """Three files in C4's form and one of plain text."""
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"c4-train.{number}.json.gz").write_bytes(gzip.compress(lines(texts(40, number)), mtime=0))
    (folder / "notes.txt").write_text("\n\n".join(texts(20, 9)), encoding="utf-8")
    return folder


def made(folder: Path, save_dir: Path, *flags: str) -> dict[str, Any]:
    common = ["--corpus", str(folder), "--save_dir", str(save_dir), "--shard_tokens", "200", *SMALL]
    common += [] if "--held_out" in flags else ["--held_out_share", "0.2"]
    return pretokenize.pretokenize(main.make_context("pretokenize.py", [*common, *flags]).params)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents_of(folder: Path, split: Any) -> list[str]:
    ids = Tokens(folder, split, 1).rows(range(len(Tokens(folder, split, 1)))).flatten()
    decoded = AutoTokenizer.from_pretrained(folder / "tokenizer").decode(ids.tolist())
    assert decoded.endswith(END)
    return decoded.removesuffix(END).split(END)


def test_every_document_is_in_one_split_in_its_order(tmp_path: Path) -> None:
    manifest = made(corpus(tmp_path / "c4"), tmp_path / "made")
    train, held_out = (documents_of(tmp_path / "made", split) for split in ("train", "held_out"))
    whole = [text for number in range(3) for text in texts(40, number)] + ["\n\n".join(texts(20, 9))]
    assert [text for text in whole if text not in held_out] == train
    assert [text for text in whole if text not in train] == held_out
    assert 10 < len(held_out) < 40
    sizes = [shard["tokens"] for shard in manifest["train"]["shards"]]
    assert len(sizes) > 3
    assert all(200 <= size < 300 for size in sizes[:-1])


def test_files_may_be_held_out_and_a_split_may_end_early(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "c4")
    (tmp_path / "other.jsonl").write_bytes(lines(texts(30, 5)))
    flags = ["--held_out", str(tmp_path / "other.jsonl"), "--tokens", "900", "--held_out_tokens", "300"]
    manifest = made(folder, tmp_path / "made", *flags)
    train, held_out = (documents_of(tmp_path / "made", split) for split in ("train", "held_out"))
    whole = [text for number in range(3) for text in texts(40, number)]
    assert train == whole[: len(train)]
    assert held_out == texts(30, 5)[: len(held_out)]
    for split, most in (("train", 900), ("held_out", 300)):
        tokens = sum(shard["tokens"] for shard in manifest[split]["shards"])
        assert most <= tokens < most + 100
    before = bytes_of(tmp_path / "made")
    made(folder, tmp_path / "made", *flags)
    assert bytes_of(tmp_path / "made") == before


def test_a_held_out_file_within_the_corpus_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with C4, whose validation files lie beside the others; also by another path to the same file."""
    folder = corpus(tmp_path / "c4")
    monkeypatch.chdir(tmp_path)
    made(folder, tmp_path / "made", "--held_out", "c4/../c4/c4-train.1.json.gz")
    whole = [text for number in (0, 2) for text in texts(40, number)] + ["\n\n".join(texts(20, 9))]
    assert documents_of(tmp_path / "made", "train") == whole
    assert documents_of(tmp_path / "made", "held_out") == texts(40, 1)
    with pytest.raises(DataError, match=r"--held_out has every file of --corpus, and none is left to train on"):
        made(folder, tmp_path / "other", "--held_out", str(folder))


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus(tmp_path / "c4")
    monkeypatch.chdir(tmp_path)
    assert sources_of([folder, Path("c4/notes.txt"), folder / "c4-train.0.json.gz"]) == sources_of([folder])
    assert sources_of([Path("c4/notes.txt"), folder / "notes.txt"])[0].name == "notes.txt"


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    """It was deleted where the folder had no manifest."""
    folder, there = corpus(tmp_path / "c4"), tmp_path / "made" / "tokenizer"
    there.mkdir(parents=True)
    (there / "source.py").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer is there, and is not the tokenizer .* another --save_dir\."):
        made(folder, tmp_path / "made")
    assert bytes_of(tmp_path / "made") == {"tokenizer/source.py": b"mine"}
    (there / "source.py").unlink()
    made(folder, tmp_path / "made")
    made(folder, tmp_path / "straight")
    assert bytes_of(tmp_path / "made") == bytes_of(tmp_path / "straight")


def test_a_tokenizer_without_shards_stays_and_is_taken_if_it_is_the_same(tmp_path: Path) -> None:
    """As of a run that was killed before its first shard; one of other flags is refused."""
    folder = corpus(tmp_path / "c4")
    made(folder, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight" / "tokenizer", tmp_path / "made" / "tokenizer")
    with pytest.raises(DataError, match=r"is not the tokenizer that these flags ask for\. Move it away"):
        made(folder, tmp_path / "made", "--tokenizer_characters", "5000")
    made(folder, tmp_path / "made")
    assert bytes_of(tmp_path / "made") == bytes_of(tmp_path / "straight")
    shutil.rmtree(tmp_path / "made" / "tokenizer")
    made(folder, tmp_path / "made")
    assert bytes_of(tmp_path / "made") == bytes_of(tmp_path / "straight")


def test_a_default_that_is_written_out_is_the_default(tmp_path: Path) -> None:
    common = ["--corpus", str(corpus(tmp_path / "c4")), "--save_dir", str(tmp_path / "made"), "--held_out_share", "0.2"]
    written = ["--text_field", "text", "--vocabulary", "4096", "--tokenizer_characters", "20000000"]
    pretokenize.pretokenize(main.make_context("", [*common]).params)
    before = bytes_of(tmp_path / "made")
    pretokenize.pretokenize(main.make_context("", [*common, *written]).params)
    assert bytes_of(tmp_path / "made") == before
    with pytest.raises(DataError, match=r"else: vocabulary 4096 there, 400 here\. Give"):
        pretokenize.pretokenize(main.make_context("", [*common, "--vocabulary", "400"]).params)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (
            b"",
            "",
            r"got no text to train on and none to hold out, .*Give a larger one, another --held_out_share than 0\.01",
        ),
        (b"\n \n", "", r"got no text to train on and none to hold out"),
        (b'{"text": "one"}\n', "", r"got no text to hold out, it is empty or too small"),
        (b'{"text": "one"}\n', "--held_out_share 0.999999", r"got no text to train on, .* than 0\.999999, or"),
        (
            b'{"text": "one"}\n',
            "--held_out none.txt",
            r"got no text to hold out, .*larger one, or other files to --held_out",
        ),
    ],
)
def test_a_corpus_that_is_empty_or_too_small_is_told(
    content: bytes, flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "none.txt").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["pretokenize.py", "--corpus", "a.jsonl", "--vocabulary", "300", *flags.split()])
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        assert entry(main) == 2
    told = capfd.readouterr().err
    assert re.search(f"^Error: --corpus: {message}", told)
    assert len(told.splitlines()) == 1
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_directory_has_the_tokenizer(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "c4")
    made(folder, tmp_path / "trained")
    flags = ["--corpus", str(folder), "--tokenizer", str(tmp_path / "trained" / "tokenizer")]
    context = main.make_context(
        "pretokenize.py", [*flags, "--held_out_share", "0.2", "--save_dir", str(tmp_path / "a")]
    )
    pretokenize.pretokenize(context.params)
    for split in ("train", "held_out"):
        assert documents_of(tmp_path / "a", split) == documents_of(tmp_path / "trained", split)


class KilledError(BaseException):
    """In the place of the end of the process."""


def dying(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> list[int]:
    """Let a call of a function of `os` be the last thing that a program does; the list counts calls."""
    calls, real = [0], getattr(os, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KilledError
        return real(*args, **kwargs)

    monkeypatch.setattr(f"shards.os.{name}", counted)
    return calls


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_whenever_it_is_killed_it_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write and every renaming of a shard and of the manifest."""
    folder = corpus(tmp_path / "c4")
    with monkeypatch.context() as patch:
        calls = dying(patch, name, 0)
        made(folder, tmp_path / "straight")
    assert calls[0] > 20
    wanted = bytes_of(tmp_path / "straight")
    for call in range(1, calls[0] + 1):
        with monkeypatch.context() as patch:
            dying(patch, name, call)
            with pytest.raises(KilledError):
                made(folder, tmp_path / str(call))
        made(folder, tmp_path / str(call))
        assert bytes_of(tmp_path / str(call)) == wanted, call


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "c4"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(4000 * texts(1)))
    command = [sys.executable, str(Path(pretokenize.__file__)), "--corpus", str(folder), "--vocabulary", "300"]
    command += ["--shard_tokens", "1000", "--save_dir", str(tmp_path / "made")]
    process = subprocess.Popen(command)
    while len(list((tmp_path / "made").glob("train-*.npy"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=300) == -signal.SIGKILL
    there = len(list((tmp_path / "made").glob("train-*.npy")))
    flags = ["--shard_tokens", "1000", "--vocabulary", "300", "--corpus", str(folder)]
    for name in ("made", "straight"):
        pretokenize.pretokenize(main.make_context("", [*flags, "--save_dir", str(tmp_path / name)]).params)
    assert there < len(list((tmp_path / "made").glob("train-*.npy")))
    assert bytes_of(tmp_path / "made") == bytes_of(tmp_path / "straight")


def test_a_signal_ends_it_after_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = corpus(tmp_path / "c4")
    made(folder, tmp_path / "straight")
    real = shards.np.save

    def save(*args: Any) -> None:
        stop_request(signal.SIGINT, None)
        real(*args)

    flags = ["--corpus", str(folder), "--save_dir", str(tmp_path / "made"), "--shard_tokens", "200"]
    flags += [*SMALL, "--held_out_share", "0.2"]
    with monkeypatch.context() as patch:
        patch.setattr(shards.np, "save", save)
        main.main(flags, standalone_mode=False)
    stop_request.received = False
    assert capsys.readouterr().out == f"stopped; the same command goes on in {tmp_path / 'made'}\n"
    assert len(list((tmp_path / "made").glob("*.npy"))) == 1
    made(folder, tmp_path / "made")
    assert bytes_of(tmp_path / "made") == bytes_of(tmp_path / "straight")


def third(damage: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    """Damage to the lines within a gzipped file."""
    return lambda whole: gzip.compress(b"".join(damage(gzip.decompress(whole).splitlines(keepends=True))), mtime=0)


DAMAGES = {
    "no JSON": (third(lambda all: [*all[:30], all[30][:9] + b"\n", *all[31:]]), r"2\.json\.gz, line 31: got no JSON"),
    "no field": (third(lambda all: [*all[:30], b'{"url": "a"}\n', *all[31:]]), r"line 31: got no text in 'text'"),
    "no text": (third(lambda all: [*all[:30], b'{"text": 3}\n', *all[31:]]), r"line 31: got no text in 'text'"),
    "a list": (third(lambda all: [*all[:30], b"[1]\n", *all[31:]]), r"line 31: got '\[1\]\\n', expected an object"),
    "no UTF-8": (third(lambda all: [*all[:30], b'{"text": "\xff"}\n', *all[31:]]), r"line 31: .* expected UTF-8"),
    "cut": (lambda whole: whole[: len(whole) // 2], r"2\.json\.gz: got no line after line \d+ \(.*Fetch it again"),
    "a wrong sum": (lambda whole: whole[:-8] + bytes(8), r"2\.json\.gz: got no line after line 40 \(CRC"),
    "no gzip": (lambda whole: b"<html>", r"2\.json\.gz: got no line after line 0 \(Not a gzipped file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_read_is_told_and_goes_on_when_mended(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    folder = corpus(tmp_path / "c4")
    made(folder, tmp_path / "straight")
    file = folder / "c4-train.2.json.gz"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            made(folder, tmp_path / "made")
    with pytest.raises(DataError, match="not all shards have been made"):
        Tokens(tmp_path / "made", "train", 8)
    file.write_bytes(whole)
    made(folder, tmp_path / "made")
    assert bytes_of(tmp_path / "made") == bytes_of(tmp_path / "straight")
    file.write_bytes(damage(whole))
    manifest = made(folder, tmp_path / "skipped", "--skip-damaged")
    left_out = [shard["left_out"] for split in ("train", "held_out") for shard in manifest[split]["shards"]]
    left_out += [manifest[split]["left_out_at_end"] for split in ("train", "held_out")]
    assert sum(left_out) == 1
    expected = set(documents_of(tmp_path / "straight", "train"))
    assert expected > set(documents_of(tmp_path / "skipped", "train")) or name == "a wrong sum"


def test_documents_left_out_at_the_end_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(texts(40)) + b"{\n")
    for _ in range(2):
        manifest = made(tmp_path / "a.jsonl", tmp_path / "made", "--skip-damaged")
        pretokenize.say_made(tmp_path / "made", manifest)
        assert capsys.readouterr().out.count("; 1 documents left out") == 1


@pytest.mark.parametrize("damage", ["cut", "missing", "another token", "no array"])
def test_a_damaged_shard_is_told_and_made_anew(damage: str, tmp_path: Path) -> None:
    folder = corpus(tmp_path / "c4")
    made(folder, tmp_path / "made")
    wanted = bytes_of(tmp_path / "made")
    shard = tmp_path / "made" / "train-00001.npy"
    whole = wanted[shard.name]
    if damage == "missing":
        shard.unlink()
    else:
        bad = {"cut": whole[:-7], "another token": whole[:-2] + b"\7\0", "no array": b"\0" * len(whole)}
        shard.write_bytes(bad[damage])
    if damage != "another token":
        with pytest.raises(
            DataError, match=r"train-00001\.npy: expected \d+ tokens, got a file that is missing or cut"
        ):
            Tokens(tmp_path / "made", "train", 8)
    made(folder, tmp_path / "made")
    assert bytes_of(tmp_path / "made") == wanted


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: got no such file, expected one of pretokenize\.py"):
        Tokens(tmp_path, "train", 8)
    for content in ("{", "[]", '{"train": {"shards": []}}'):
        (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"manifest\.json is damaged\. Delete it"):
            Tokens(tmp_path, "train", 8)
    whole = json.dumps(made(corpus(tmp_path / "c4"), tmp_path / "made"))
    for name in ("complete", "left_out_at_end", "name", "digest", "ends", "before"):
        assert f'"{name}"' in whole
        (tmp_path / "manifest.json").write_text(whole.replace(f'"{name}"', '"nothing"'), encoding="utf-8")
        with pytest.raises(DataError, match=r"manifest\.json is damaged\. Delete it"):
            Tokens(tmp_path, "train", 8)


def test_other_flags_and_another_corpus_are_refused(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "c4")
    made(folder, tmp_path / "made")
    with pytest.raises(DataError, match=r"shards of something else: text_field text there, content here"):
        made(folder, tmp_path / "made", "--text_field", "content")
    with pytest.raises(DataError, match=r"vocabulary 300 there, 400 here"):
        made(folder, tmp_path / "made", "--vocabulary", "400")
    (folder / "notes.txt").rename(folder / "others.txt")
    with pytest.raises(DataError, match=r"files .* there, .* here. Give the same flags, or another --save_dir"):
        made(folder, tmp_path / "made")


@pytest.mark.parametrize("tokens", [[], ["--tokens", "1500"]], ids=["whole", "part"])
def test_a_corpus_that_has_changed_where_it_was_read_is_refused(tokens: list[str], tmp_path: Path) -> None:
    folder = corpus(tmp_path / "c4")
    made(folder, tmp_path / "made", *tokens)
    shutil.copytree(folder, tmp_path / "other")
    first = tmp_path / "other" / "c4-train.0.json.gz"
    first.write_bytes(gzip.compress(lines([*texts(39), "more words than before"]), mtime=0))
    with pytest.raises(DataError, match=r"are others than those that had been read|got other documents up to number"):
        made(tmp_path / "other", tmp_path / "made", *tokens)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--corpus missing", r"missing: got no such file, expected a file or a directory"),
        ("--corpus a.csv", r"a\.csv: expected a name that ends with \.json\.gz"),
        ("--corpus empty", r"empty: got no file there that ends with"),
        ("--corpus installed --corpus a.txt", r"--corpus installed goes alone"),
        ("--corpus a.txt --text_field content", r"--text_field is about \.json\.gz, .*Leave it out"),
        ("--corpus a.txt --held_out a.txt --held_out_share 0.1", r"say both what is held out"),
        ("--corpus a.txt --tokenizer empty --vocabulary 400", r"got --tokenizer\. Leave them out"),
        ("--corpus a.txt --tokenizer empty", r"empty: got no tokenizer there"),
        ("--corpus a.txt --tokenizer endless", r"endless: expected a fast tokenizer .* that has an end of text"),
    ],
)
def test_wrong_flags_are_told(flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "a.txt"):
        (tmp_path / name).write_text("a text", encoding="utf-8")
    endless = pretokenize.trained(pretokenize.corpus_of(main.make_context("", ["--corpus", "a.txt"]).params), 300, None)
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(DataError, match=message):
        pretokenize.pretokenize(main.make_context("", [*flags.split(), "--save_dir", "made"]).params)


def test_installed_texts_come_in_one_order_and_whole_files_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [tmp_path / "lib", tmp_path / "packages"]
    for root in roots:
        for number in range(60):
            path = root / f"{root.name}{number % 7}" / f"m{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"def f{number}(): return '{root.name}'\n", encoding="utf-8")
    for path, content in ((roots[0] / "bad.py", b"\xff"), (roots[0] / "empty.py", b""), (roots[0] / "c.json", b"{}")):
        path.write_bytes(content)
    inner = roots[0] / "site-packages" / "a.py"
    inner.parent.mkdir()
    inner.write_text("pass", encoding="utf-8")
    found = installed(roots)
    assert len(found) == 121
    assert found == installed(list(reversed(roots)))
    first = [source.name.startswith("lib") for source in found[:40]]
    assert 10 < sum(first) < 30
    monkeypatch.setattr(pretokenize, "installed", lambda: found)
    flags = [
        "--corpus",
        "installed",
        "--vocabulary",
        "300",
        "--held_out_share",
        "0.2",
        "--save_dir",
        str(tmp_path / "m"),
    ]
    manifest = pretokenize.pretokenize(main.make_context("", flags).params)
    held_out = documents_of(tmp_path / "m", "held_out")
    assert held_out == [
        each.path.read_text(encoding="utf-8") for each in found if is_held_out(each, 1, 0.2) and each.name != "bad.py"
    ]
    assert len(held_out) + len(documents_of(tmp_path / "m", "train")) == 120
    assert sum(shard["left_out"] for split in ("train", "held_out") for shard in manifest[split]["shards"]) == 1


def test_a_corpus_is_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.jsonl", "b/no.bin"):
        path = tmp_path / "c" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a", encoding="utf-8")
    assert [source.name for source in sources_of([tmp_path / "c"])] == ["a.txt", "b/1.jsonl", "b/2.txt"]


def test_rows_are_of_whole_shards(tmp_path: Path) -> None:
    manifest = made(corpus(tmp_path / "c4"), tmp_path / "made")
    sizes = [shard["tokens"] for shard in manifest["train"]["shards"]]
    tokens = Tokens(tmp_path / "made", "train", 64)
    assert len(tokens) == sum(size // 64 for size in sizes)
    ids = [torch.from_numpy(shards.np.load(tmp_path / "made" / f"train-{n:05}.npy").astype(int)) for n in range(2)]
    first = sizes[0] // 64
    wanted = torch.stack([ids[0][:64], ids[0][(first - 1) * 64 : first * 64], ids[1][:64]])
    assert tokens.rows([0, first - 1, first]).equal(wanted)
    with pytest.raises(
        DataError, match=r"no held_out shard of 9999 tokens\. Give a smaller --max_length, .*--held_out_share"
    ):
        Tokens(tmp_path / "made", "held_out", 9999)
