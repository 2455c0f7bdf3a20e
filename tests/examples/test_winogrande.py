"""WinoGrande: files, what is scored, and short runs of a tiny model on made-up sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interrupt import stop_request
from methods import optimizer_of
from pretrained import causal
from records import DataError
from support.errors import largest_error
from winogrande import DEFAULT_LR, IGNORED, Blank, Sentences, WinoGrande, likelihoods, main, options_of, read

from colossal_bcd.testing import run_ranks

TOY = ["--toy", "--precision", "fp32", "--batch-size", "8", "--eval-every", "60"]
LOW = ["--rank", "8"]
EATS = {"cat": "fish", "cow": "hay", "bee": "nectar", "owl": "mice"}


def sentences(folder: Path) -> Path:
    """Who eats what; nothing but the animal tells."""
    foods = list(EATS.values())
    for name, count in (("train_xl", 48), ("dev", 24)):
        rows = []
        for index in range(count):
            animal, food = list(EATS.items())[index % 4]
            other = foods[(index % 4 + 1 + index // 4 % 3) % 4]
            options = (food, other) if index % 3 else (other, food)
            rows.append(
                {
                    "qID": f"Q{index}-1",
                    "sentence": f"A {animal} eats _ .",
                    "option1": options[0],
                    "option2": options[1],
                    "answer": "1" if index % 3 else "2",
                }
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def flags_of(*flags: str) -> dict[str, Any]:
    return main.make_context("winogrande.py", list(flags)).params


def results_of(runs: dict[str, list[str]], folder: str, stop: str = "") -> dict[str, Any]:
    """What runs with these flags leave, by name; the last rank is asked to stop one before the first step."""
    for name, flags in runs.items():
        stop_request.received = name == stop and dist.get_rank() == dist.get_world_size() - 1
        WinoGrande(**flags_of(*flags, "--output", f"{folder}/{name}")).train()
        if name == stop:
            stop_request.received = False
            WinoGrande(**flags_of(*flags, "--output", f"{folder}/{name}", "--resume")).train()
        dist.barrier()  # the first rank has written
    return {name: json.loads(Path(folder, name, "results.json").read_text(encoding="utf-8")) for name in runs}


def test_a_line_of_the_benchmark_is_read(tmp_path: Path) -> None:
    line = {
        "qID": "3QHITW7OYO7Q6B6ISU2UMJB84ZLAQE-2",
        "sentence": "Ian volunteered to eat Dennis's menudo because _ despised eating intestine.",
        "option1": "Ian",
        "option2": "Dennis",
        "answer": "2",
    }
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    text = "Ian volunteered to eat Dennis's menudo because {} despised eating intestine."
    assert read(path) == [Blank((text.format("Ian"), text.format("Dennis")), 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentence": "No blank."}, r"dev\.jsonl, line 2: got 0 blanks '_' in 'sentence', expected 1"),
        ({"sentence": "_ and _"}, r"line 2: got 2 blanks"),
        ({"option2": None}, r"line 2: got no text in 'option2', expected WinoGrande's fields"),
        ({"answer": ""}, r"line 2: got '' in 'answer', expected '1' or '2'"),
        ({"answer": 1}, r"line 2: got 1 in 'answer'"),
    ],
)
def test_wrong_lines_are_told_by_name_and_number(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = sentences(tmp_path) / "dev.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], json.dumps({**json.loads(lines[1]), **change})]), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(path)


def test_missing_and_empty_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train_xl\.jsonl: No such file"):
        read(tmp_path / "train_xl.jsonl")
    (tmp_path / "dev.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"dev\.jsonl: got no records"):
        read(tmp_path / "dev.jsonl")


def test_what_is_scored_begins_where_the_sentences_differ() -> None:
    _, tokenizer = causal(None, True, "fp32")
    found = Sentences([Blank(("to cat.", "to cow!"), 1), Blank(("ab", "abc"), 0)], tokenizer)
    ids, labels = found.batch([0, 1], both=True)
    assert ids.shape == labels.shape == (4, 8)
    scored = [tokenizer.decode(row[row != IGNORED].tolist()) for row in labels]
    assert scored == ["at.", "ow!", "b", "bc"]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()] == [
        "to cat.",
        "to cow!",
        "ab",
        "abc",
    ]
    ids, labels = found.batch([0, 1], both=False)
    assert [tokenizer.decode(row[row != IGNORED].tolist()) for row in labels] == ["ow!", "b"]
    with pytest.raises(DataError, match="the same tokens with both options"):
        Sentences([Blank(("same", "same"), 0)], tokenizer)


def test_likelihoods_are_means_of_the_models_probabilities() -> None:
    """Token by token, each from a forward of what comes before it alone."""
    model, tokenizer = causal(None, True, "fp64")
    ids, labels = Sentences([Blank(("to cat.", "to cow, he"), 1)], tokenizer).batch([0], both=True)
    with torch.no_grad():
        found = likelihoods(model(input_ids=ids).logits, labels)
        for row in range(2):
            places = (labels[row] != IGNORED).nonzero()[:, 0].tolist()
            wanted = [
                model(input_ids=ids[row : row + 1, :place]).logits[0, -1].log_softmax(0)[ids[row, place]]
                for place in places
            ]
            assert largest_error(found[row], torch.stack(wanted).mean()) < 1e-12


def test_flags_of_the_seed_are_what_they_ask_for(tmp_path: Path) -> None:
    seed = (
        "--optimizer golore_sgd --learning_rate 1e-3 --momentum 0.9 --dampening 0.0 --weight_decay 0.0 --rank 1024 "
        "--update_proj_gap 500 --galore_scale 4.0 --rand_ratio 0.8 --num_train_epochs 30 --num_train 1000 "
        "--num_eval 1000"
    )
    flags = flags_of("--data", str(tmp_path), *seed.split())
    assert (flags["num_train"], flags["num_eval"]) == (1000, 1000)
    options = options_of(flags, 100)
    assert options == options_of(flags_of("--data", str(tmp_path)), 100)
    optimizer = optimizer_of("golore-sgd", causal(None, True, "fp32")[0], options)
    group = optimizer.param_groups[0]
    wanted = {"lr": 1e-3, "momentum": 0.9, "rank": 1024, "scale": 4.0, "update_proj_gap": 500, "random_from_step": 80}
    assert {name: group[name] for name in wanted} == wanted


def test_flags_of_other_methods_are_refused() -> None:
    flags = flags_of("--data", "unread", "--method", "adamw", "--rank", "4")
    with pytest.raises(DataError, match=r"--rank is about golore-sgd, galore-sgd, golore, galore, got adamw"):
        WinoGrande(**flags)


def test_every_method_learns_what_only_the_sentence_tells(tmp_path: Path) -> None:
    common = [*TOY, "--data", str(sentences(tmp_path / "data")), "--steps", "60"]
    rates = {
        "golore-sgd": "3e-2", "galore-sgd": "3e-2", "sgd": "2e-2", "golore": "1e-2", "galore": "1e-2", "adamw": "1e-2",
        "badam": "3e-2",
    }  # fmt: skip
    runs = {}
    for name, lr in rates.items():
        runs[name] = [*common, *(LOW if name.startswith("g") else []), "--method", name, "--lr", lr]
    runs["badam"] += ["--switch_every", "3"]
    runs["classified"] = [*common, "--method", "adamw", "--lr", "1e-2", "--train_as_classification"]
    assert rates.keys() == DEFAULT_LR.keys()
    found = run_ranks(2, results_of, runs, str(tmp_path / "runs"))[0]
    for name, results in found.items():
        assert results["constant"]["accuracy"] == pytest.approx(2 / 3)
        assert results["held_out"]["60"]["accuracy"] > 0.9, name
        assert name == "classified" or results["held_out"]["60"]["loss"] < results["held_out"]["0"]["loss"], name


@pytest.mark.parametrize("plugin", ["zero", "fsdp"])
def test_two_ranks_equal_one_in_float64(plugin: str, tmp_path: Path) -> None:
    """SGD with momentum in low-rank space, refreshes and random bases included."""
    flags = [
        *TOY,
        *LOW,
        "--data",
        str(sentences(tmp_path / "data")),
        "--steps",
        "6",
        "--update_proj_gap",
        "2",
        "--rand_ratio",
        "0.5",
        "--lr",
        "1e-2",
    ]
    runs = {"golore": [*flags, "--precision", "fp64", "--plugin", plugin]}
    one, two = (run_ranks(n, results_of, runs, str(tmp_path / str(n)))[0]["golore"] for n in (1, 2))
    losses = [torch.tensor(list(each["losses"].values()), dtype=torch.float64) for each in (one, two)]
    assert losses[0][0] - losses[0][-1] > 1e-3
    # Singular vectors of gradients that differ by rounding, 1e-16, differ by that over the gaps of singular values.
    assert largest_error(*losses) < 1e-9


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_stopped_ends_as_the_straight_one(ranks: int, tmp_path: Path) -> None:
    flags = [
        *TOY,
        *LOW,
        "--data",
        str(sentences(tmp_path / "data")),
        "--steps",
        "5",
        "--update_proj_gap",
        "2",
        "--lr",
        "1e-2",
    ]
    runs = {"straight": flags, "stopped": flags}
    found = run_ranks(ranks, results_of, runs, str(tmp_path), "stopped")[0]
    assert found["stopped"] == found["straight"]


def test_tensor_parallel_ranks_learn(tmp_path: Path) -> None:
    flags = [*TOY, *LOW, "--data", str(sentences(tmp_path / "data")), "--steps", "20", "--lr", "3e-2"]
    runs = {"tp": [*flags, "--plugin", "hybrid", "--tp", "2"], "zero": flags}
    found = run_ranks(2, results_of, runs, str(tmp_path))[0]
    assert found["tp"]["held_out"]["20"]["loss"] == pytest.approx(found["zero"]["held_out"]["20"]["loss"], abs=1e-2)
    assert found["tp"]["held_out"]["20"]["loss"] < found["tp"]["held_out"]["0"]["loss"] - 0.5
