"""Pretraining at toy size: every optimizer, other numbers of ranks, interrupted and resumed, wrong flags and data."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pretokenize
import pretrain
import pytest
import table
import torch
import torch.distributed as dist
from figures import perplexity
from interrupt import stop_request
from presets import PRESETS, config_of
from pretrain import METHODS, Pretrain, cosine, factor_of, main, name_of, options_of, require_divisible
from records import DataError
from support.errors import largest_error
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from colossal_bcd.testing import RankError, run_ranks

SCRIPT = Path(pretrain.__file__)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
LOW_RANK = "--rank 4 --update_proj_gap 2 --galore_scale 1"


def tokens(folder: Path) -> list[str]:
    """Flags that say which data and which model: sentences that count, with one in five held out."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    found = [{"text": " ".join(names[(start + n) % 10] for n in range(12))} for start in range(10) for _ in range(30)]
    (folder / "count.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found), encoding="utf-8")
    made = ["--corpus", str(folder / "count.jsonl"), "--vocabulary", "300", "--save_dir", str(folder / "tokens")]
    pretokenize.pretokenize(pretokenize.main.make_context("", [*made, "--held_out_share", "0.2"]).params)
    (folder / "toy.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 7, **SIZES}), encoding="utf-8")
    flags = ["--dataset_path", str(folder / "tokens"), "--model_config", str(folder / "toy.json")]
    return [*flags, "--max_length", "16", "--warmup_steps", "1", "--eval_every", "50", "--eval_tokens", "200"]


def flags_of(*flags: str) -> dict[str, Any]:
    return main.make_context("pretrain.py", list(flags)).params


def trained(*flags: str) -> None:
    Pretrain(**flags_of(*flags)).train()
    dist.barrier()  # the first rank has written


def results_of(runs: dict[str, list[str]], folder: str) -> dict[str, Any]:
    """What runs with these flags leave, by name."""
    for name, flags in runs.items():
        trained(*flags, "--output", f"{folder}/{name}")
    return {name: json.loads(Path(folder, name, "results.json").read_text(encoding="utf-8")) for name in runs}


WAYS = {
    "adamw": "--lr 2e-2", "galore_adamw": f"--lr 2e-2 {LOW_RANK}", "golore_adamw": f"--lr 2e-2 {LOW_RANK}",
    "sgd": "--lr 0.1", "galore_sgd": f"--lr 0.1 {LOW_RANK}", "golore_sgd": f"--lr 0.1 {LOW_RANK} --momentum 0.8",
    "adafactor": "--lr 1e-1", "came": "--lr 1e-2", "lamb": "--lr 5e-2",
}  # fmt: skip


@pytest.mark.parametrize("names", [list(WAYS)[:3], list(WAYS)[3:6], list(WAYS)[6:]], ids=lambda names: names[0])
def test_every_optimizer_learns_on_two_ranks(names: list[str], tmp_path: Path) -> None:
    common = [*tokens(tmp_path), "--dtype", "float32", "--batch_size", "4", "--total_batch_size", "16"]
    assert WAYS.keys() == METHODS.keys()
    runs = {name: [*common, "--num_training_steps", "20", "--optimizer", name, *WAYS[name].split()] for name in names}
    for name, results in run_ranks(2, results_of, runs, str(tmp_path / "runs"))[0].items():
        before, after = (results["held_out"][step] for step in ("0", "20"))
        assert after["loss"] < 0.95 * before["loss"], name
        assert after["perplexity"] == pytest.approx(2.718281828459045 ** after["loss"]), name


def in_float64(folder: Path) -> list[str]:
    flags = "--optimizer sgd --lr 0.5 --dtype float64 --num_training_steps 6 --eval_every 3 --cycle_length 3"
    return [*tokens(folder), *flags.split(), "--total_batch_size", "12"]


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    losses = [torch.tensor(list(each["losses"].values()), dtype=torch.float64) for each in (one, other)]
    held_out = [torch.tensor([found["loss"] for found in each["held_out"].values()]) for each in (one, other)]
    assert losses[0][0] - losses[0][-1] > 1e-2
    return max(largest_error(*losses), largest_error(*held_out))


@pytest.mark.parametrize("plugin", ["zero", "fsdp", "hybrid --tp 2"])
def test_ranks_and_accumulation_give_the_losses_of_one_in_float64(plugin: str, tmp_path: Path) -> None:
    flags = in_float64(tmp_path)
    one = {"one": [*flags, "--batch_size", "12"]}
    two = {str(micro): [*flags, "--batch_size", str(micro), "--plugin", *plugin.split()] for micro in (2, 6)}
    straight = run_ranks(1, results_of, one, str(tmp_path / "runs"))[0]["one"]
    for found in run_ranks(2, results_of, two, str(tmp_path / "runs"))[0].values():
        assert largest_difference(straight, found) < 1e-12


def ended_by(number: int, flags: list[str], rank: int, step: int) -> None:
    """Let a signal reach one rank within a step of a run."""
    signal.signal(signal.SIGINT, stop_request)
    real: Callable[..., Any] = Pretrain.backward

    def backward(run: Pretrain, at: int) -> Any:
        if at == step and dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        return real(run, at)

    Pretrain.backward = backward  # type: ignore[method-assign]
    try:
        trained(*flags)
    finally:
        Pretrain.backward = real  # type: ignore[method-assign]
        stop_request.received = False


def killed(flags: list[str], ranks: int, step: int) -> None:
    with pytest.raises(RankError):
        run_ranks(ranks, ended_by, signal.SIGKILL, flags, ranks - 1, step)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "golore_adamw"])
def test_a_run_that_was_ended_goes_on_to_the_same_results(optimizer: str, ranks: int, tmp_path: Path) -> None:
    """By Ctrl-C after a step, and killed within one, of which the newest checkpoint is behind; bit for bit."""
    flags = [*tokens(tmp_path), "--dtype", "bfloat16", "--batch_size", "2", "--total_batch_size", "8", "--lr", "1e-2"]
    flags += ["--optimizer", optimizer, "--num_training_steps", "5", "--save_every", "2", "--autoresume", "True"]
    flags += LOW_RANK.split() if optimizer != "adamw" else []
    straight = run_ranks(ranks, results_of, {"straight": flags}, str(tmp_path))[0]["straight"]
    assert straight["losses"].keys() == {"1", "2", "3", "4", "5"}
    ended = {name: [*flags, "--output", str(tmp_path / name)] for name in ("stopped", "killed")}
    run_ranks(ranks, ended_by, signal.SIGINT, ended["stopped"], ranks - 1, 1)
    assert (tmp_path / "stopped" / "checkpoints" / "step-00000001").is_dir()
    killed(ended["killed"], ranks, 4)
    assert not (tmp_path / "killed" / "results.json").exists()
    assert (tmp_path / "killed" / "checkpoints" / "step-00000002").is_dir()
    found = run_ranks(ranks, results_of, dict.fromkeys(ended, flags), str(tmp_path))[0]
    assert found == {"stopped": straight, "killed": straight}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    """And with other rows of a backward pass, to the losses of a straight run."""
    flags = [*in_float64(tmp_path), "--save_every", "2", "--resume"]
    straight = run_ranks(1, results_of, {"straight": [*flags, "--batch_size", "12"]}, str(tmp_path))[0]["straight"]
    killed([*flags, "--batch_size", "6", "--output", str(tmp_path / "run")], before, 5)
    found = run_ranks(after, results_of, {"run": [*flags, "--batch_size", "3"]}, str(tmp_path))[0]["run"]
    assert largest_difference(straight, found) < 1e-12
    assert found["run"] == straight["run"]


def test_the_rate_rises_falls_and_starts_again() -> None:
    factors = [cosine(2, 6, 0.1, step) for step in range(12)]
    assert factors[:6] == factors[6:]
    middle = 0.1 + 0.9 / 2
    assert factors[:2] == [0.5, 1]
    assert factors[2] == 1
    assert factors[4] == pytest.approx(middle)
    assert factors[3] + factors[5] == pytest.approx(2 * middle)
    assert cosine(0, 10**6, 0.1, 10**6 - 1) == pytest.approx(0.1)


def test_presets_have_the_weights_of_their_names() -> None:
    for name in PRESETS:
        with torch.device("meta"):
            model = LlamaForCausalLM(config_of(name, 32000, 256))
        millions = int(name[6:-1]) * {"m": 1, "b": 1000}[name[-1]]
        # The largest one has 1.34 billion.
        bound = 0.06 if name != "llama_1b" else 0.35
        assert sum(param.numel() for param in model.parameters()) / 1e6 == pytest.approx(millions, rel=bound), name


def test_the_command_of_the_paper_is_understood(tmp_path: Path) -> None:
    command = (
        "--model_config llama_60m --dataset_path tokens --autoresume True --batch_size 128 --total_batch_size 512 "
        "--lr 0.001 --max_length 256 --rank 128 --update_proj_gap 200 --cycle_length 10000 --warmup_steps 1000 "
        "--num_training_steps 10000 --save_every 10000 --eval_every 500 --save_dir Llama60M --optimizer adamw "
        "--rand_ratio 0.8 --tags GoLore_60M_rand0.8 --use_peft True --Golore"
    )
    flags = flags_of(*command.split())
    flags["optimizer"] = name_of(flags)
    assert flags["optimizer"] == "golore_adamw"
    assert (flags["resume"], flags["checkpoint_every"], flags["output"]) == (True, 10000, Path("Llama60M"))
    options = options_of(flags)
    names = ("lr", "steps", "period", "rank", "scale", "rand_ratio")
    assert [getattr(options, name) for name in names] == [1e-3, 10000, 200, 128, 0.25, 0.8]
    assert [factor_of(flags)(step) for step in (0, 499, 999)] == [1e-3, 0.5, 1]
    require_divisible(512, 128, 2)


def test_every_flag_of_the_page_is_one_of_the_program() -> None:
    page = (SCRIPT.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = {"pretrain": main, "pretokenize": pretokenize.main, "table": table.main}
    given = re.findall(r"examples/pretrain/(\w+)\.py (.*)", page) + re.findall(r"    run (\w+)-\S+ (.*)", page)
    assert len(given) >= 9
    for program, words in given:
        known = {name for param in commands.get(program, main).params for name in param.opts}
        assert set(re.findall(r"(?<!\S)--[\w-]+", words)) - known == set(), words


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rank 4", "--rank is about galore_adamw, golore_adamw, galore_sgd, golore_sgd, got adamw"),
        ("--optimizer galore_adamw --rand_ratio 0.5", "--rand_ratio is about golore_adamw, golore_sgd, got galore_"),
        ("--optimizer lamb --momentum 0.5", "--momentum is about sgd, galore_sgd, golore_sgd, got lamb"),
        ("--optimizer lamb --Golore", "--Golore is about adamw and sgd, got --optimizer lamb"),
        ("--use_peft True", "--use_peft goes with --Golore"),
        ("--base_dir c4", "--base_dir: held-out tokens are in --dataset_path, too"),
        ("--cycle_length 3 --num_training_steps 10", r"10 is no multiple of --cycle_length 3.*Give 9 steps"),
        ("--cycle_length 30 --num_training_steps 10", r"Give 30 steps, or another length"),
        ("--warmup_steps 10 --num_training_steps 10", r"--warmup_steps 10 take the whole cycle of 10 steps"),
        ("--num_training_steps 3 --warmup_steps 1", r"no/manifest\.json: got no such file.*Run that first"),
    ],
)
def test_flags_without_effect_or_sense_are_refused(flags: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Pretrain(**flags_of("--dataset_path", "no", "--lr", "1", "--batch_size", "1", *flags.split()))


def refused(flags: list[str], cases: dict[str, str]) -> list[str]:
    told = []
    for more in cases:
        with pytest.raises(DataError) as raised:
            trained(*flags, *more.split())
        told.append(str(raised.value))
    return told


def test_what_does_not_fit_the_ranks_or_an_earlier_run_is_refused(tmp_path: Path) -> None:
    flags = [*tokens(tmp_path), "--dtype", "float32", "--lr", "1e-2", "--num_training_steps", "2", "--save_every", "1"]
    flags += ["--save_dir", str(tmp_path / "run")]
    run_ranks(1, trained, *flags, "--batch_size", "8")
    cases = {
        "--batch_size 3 --total_batch_size 8": "8 is no multiple of --batch_size 3 on 2 ranks, 6. Give 6 or 12, or",
        "--batch_size 8 --total_batch_size 8": "8 is no multiple of --batch_size 8 on 2 ranks, 16. Give 16, or another",
        "--batch_size 4 --single_gpu": "--single_gpu: got 2 ranks. Start one, or leave it out.",
        "--batch_size 4 --eval_tokens 15": "--eval_tokens 15 are no row of 16. Give more.",
        "--batch_size 4 --tp 2": "--tp 2 needs --plugin hybrid",
        "--batch_size 4": "has step 2 of an earlier run. Go on from there with --resume",
        "--batch_size 4 --seed 1 --resume": "of a run with other flags: --seed 0 there, 1 here. Give the same",
        "--batch_size 8 --resume": "of a run with other flags: --total-batch-size 8 there, 16 here",
    }
    for told in run_ranks(2, refused, flags, cases):
        for message, wanted in zip(told, cases.values(), strict=True):
            assert wanted in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--model_config: got '.*toy\.json', expected one of llama_9m, .* or a configuration's file"),
        ("{", r"toy\.json: got no JSON"),
        ('{"model_type": "gpt2"}', r"toy\.json: expected the model_type llama and hidden_size"),
        ('{"model_type": "llama", "hidden_size": 8}', r"expected the model_type llama and hidden_size"),
    ],
)
def test_wrong_configurations_are_told(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "toy.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        config_of(str(tmp_path / "toy.json"), 300, 16)


def test_a_damaged_shard_ends_the_program_with_one_line(tmp_path: Path) -> None:
    flags = [*tokens(tmp_path), "--lr", "1", "--batch_size", "1", "--num_training_steps", "2"]
    shard = tmp_path / "tokens" / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-9])
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert line.startswith(f"Error: {shard}: expected ")
    assert line.endswith("Give the command of pretokenize.py again: it makes this one anew.")


def test_the_model_that_is_left_has_the_loss_that_was_said(tmp_path: Path) -> None:
    flags = [*tokens(tmp_path), "--dtype", "float32", "--lr", "2e-2", "--num_training_steps", "10", "--save"]
    found = run_ranks(2, results_of, {"run": [*flags, "--batch_size", "8"]}, str(tmp_path))[0]["run"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert found["counts"]["weights"] == sum(param.numel() for param in model.parameters())
    assert found["counts"]["weights of the layers"] == found["counts"]["weights"] - 2 * model.config.vocab_size * 32
    rows = pretrain.Tokens(tmp_path / "tokens", "held_out", 16).rows(range(200 // 16))
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert loss == pytest.approx(found["held_out"]["10"]["loss"], rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.decode(tokenizer("one two").input_ids) == "one two"


@pytest.mark.parametrize("damage", ["empty", "damaged"])
def test_a_missing_tokenizer_is_told_before_training_to_save(damage: str, tmp_path: Path) -> None:
    """All of the run was lost at its end; the remedy that is told mends it."""
    common = tokens(tmp_path)
    for path in (tmp_path / "tokens" / "tokenizer").iterdir():
        path.unlink()
    if damage == "damaged":
        (tmp_path / "tokens" / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    flags = flags_of(*common, "--lr", "1", "--batch_size", "2", "--num_training_steps", "2", "--save")
    with pytest.raises(
        DataError, match=r"tokenizer: got no tokenizer there .*--save goes with it: give the command of"
    ):
        Pretrain(**flags)
    assert not dist.is_initialized()


def test_a_tokenizer_that_is_missing_is_made_anew(tmp_path: Path) -> None:
    """As what is told without it says."""
    tokens(tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "tokens").rglob("*") if path.is_file()}
    for path in (tmp_path / "tokens" / "tokenizer").iterdir():
        path.unlink()
    tokens(tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "tokens").rglob("*") if path.is_file()} == files


def test_a_perplexity_beyond_floats_is_infinite(tmp_path: Path) -> None:
    """Of a run that diverges; it ended with an OverflowError."""
    assert [perplexity(loss) for loss in (0.0, 709.0, 710.0)] == [1.0, math.exp(709.0), math.inf]
    diverged = SimpleNamespace(micro=1, shares=1, tp=1, eval_rows=2, share=list, total=list, device="cpu")
    diverged.held_out, diverged.losses = SimpleNamespace(rows=torch.tensor), lambda rows: torch.tensor([800.0])
    assert Pretrain.evaluate(diverged) == {"loss": 800.0, "perplexity": math.inf}  # type: ignore[arg-type]
    found = table.read([written(tmp_path / str(seed), seed, loss) for seed, loss in enumerate((800.0, math.inf, 1.0))])
    assert "| inf ± nan | inf ± nan |" in table.table(found)[-1]
    found = table.read([written(tmp_path / f"b{seed}", seed, loss) for seed, loss in enumerate((800.0, 1.0))])
    assert "| 400.500 ± 564.978 | inf ± nan |" in table.table(found)[-1]


def written(folder: Path, seed: int, last: float, **more: str) -> Path:
    """What a run leaves, with held-out losses of 2, 1.5 and `last`."""
    folder.mkdir()
    run = dict.fromkeys(table.SAME, "1") | {"num_training_steps": "20", "optimizer": "adamw", "lr": "0.1"}
    run |= {"tags": "None", "rand_ratio": "None", "seed": str(seed), **more}
    held_out = {step: {"loss": loss} for step, loss in (("0", 2.0), ("10", 1.5), ("20", last))}
    (folder / "results.json").write_text(json.dumps({"run": run, "held_out": held_out}), encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps({"seconds_per_step": 0.25}), encoding="utf-8")
    return folder


def test_seeds_become_means_and_deviations(tmp_path: Path) -> None:
    """By hand: 1.0, 1.2, 1.4 and 0.9, 1.3; differences -0.1, 0.1."""
    folders = [written(tmp_path / f"a{seed}", seed, 1.0 + 0.2 * seed) for seed in range(3)]
    golore = {"optimizer": "golore_adamw", "tags": "GoLore", "rand_ratio": "0.5"}
    folders += [written(tmp_path / f"b{seed}", seed, 0.9 + 0.4 * seed, **golore) for seed in range(2)]
    found = table.read(folders)
    assert table.table(found) == [
        "| run | lr | seeds | held-out loss | perplexity | seconds per step | loss minus adamw's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| adamw | 0.1 | 3 | 1.200 ± 0.200 | 3.4 ± 0.7 | 0.25 | - |",
        "| GoLore | 0.1 | 2 | 1.100 ± 0.283 | 3.1 ± 0.9 | 0.25 | 0.000 ± 0.141 |",
    ]
    table.draw(found, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "a", 0, 1.0)
    with pytest.raises(DataError, match=r"other: got max_length 2, expected max_length 1 of .*a\. Leave it out"):
        table.read([first, written(tmp_path / "other", 1, 1.0, max_length="2")])
    with pytest.raises(DataError, match=r"b: seed 0 of adamw is there twice"):
        table.read([first, written(tmp_path / "b", 0, 1.1)])
    with pytest.raises(DataError, match=r"c: the run ended after step 20\. Let it go on with --resume"):
        table.read([written(tmp_path / "c", 0, 1.1, num_training_steps="30")])
    with pytest.raises(DataError, match=r"d/results\.json: got no results there"):
        table.read([tmp_path / "d"])


@pytest.mark.parametrize(
    "results",
    [
        {},
        [],
        {"run": {"method": "badam", "seed": "0"}, "held_out": {}},
        {"run": dict.fromkeys(table.USED, "1"), "held_out": {}},
        {"run": dict.fromkeys(table.USED, "1"), "held_out": []},
        {"run": dict.fromkeys(table.USED, "1"), "held_out": {"1": {"accuracy": 0.5}}},
    ],
)
def test_results_of_another_program_are_told(results: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "a", 0, 1.0)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(DataError, match=r"a/results\.json: got no results there, expected those of pretrain\.py"):
        table.read([folder])
    folder = written(tmp_path / "b", 0, 1.0)
    (folder / "figures.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"b/figures\.json: got no results there"):
        table.read([folder])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.txt", r"^--plot x\.txt: expected a name that ends with \.png, \.pdf, \.svg\. Give one\.$"),
        ("nosuch/x.png", r"^--plot nosuch/x\.png: got no folder nosuch\. Make it, or give another\.$"),
    ],
)
def test_a_picture_that_cannot_be_written_is_told_before_the_table(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        table.main.main([str(written(tmp_path / "a", 0, 1.0)), "--plot", name], standalone_mode=False)
    assert capsys.readouterr().out == ""
    table.main.main([str(tmp_path / "a"), "--plot", "x.SVG"], standalone_mode=False)
    assert b"<svg" in (tmp_path / "x.SVG").read_bytes()
