"""The main job: flags, data, figures, and short runs on two ranks against one process."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import data
import pytest
import torch
from compare_losses import largest_difference, read_losses
from data import load_corpus, read_paragraphs, split_paragraphs, train_tokenizer
from events import require_tensorboard
from interrupt import stop_request
from main import main, settings_of
from measure import expected_bytes
from report import Curve, Point, write_losses
from settings import LOW_RANK, Settings, SettingsError
from training import run

from colossal_bcd.testing import RankError, run_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune" / "main.py"
SHAPE = ["--hidden-size", "32", "--layers", "2", "--sequence-length", "16", "--batch-size", "8"]
ONE_BLOCK = [*SHAPE, "--steps", "6", "--eval-every", "3"]
PROJECTED = ["--precision", "fp32", "--rank", "8", "--gap", "2"]
SMALL = [*ONE_BLOCK, "--switch-every", "2"]


def settings(*flags: str, world_size: int = 2) -> Settings:
    return settings_of(main.make_context("main.py", list(flags)).params, world_size)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tp 2", "needs --plugin hybrid"),
        ("--tp 3 --plugin hybrid", "does not divide the 2 ranks"),
        ("--zero-stage 0", "has --zero-stage 1 or 2"),
        ("--plugin ddp --zero-stage 1", "shards nothing"),
        ("--plugin ddp --clip 1", "--clip needs"),
        ("--plugin ddp --precision fp16", "no loss scaling"),
        ("--plugin ddp --optimizer lamb", "no float32 masters"),
        ("--plugin hybrid --precision fp32 --zero-stage 1", "--zero-stage 0 only"),
        ("--batch-size 6 --accumulate 2", "not a multiple of 4"),
        ("--optimizer lamb --switch-every 5", "is about blocks"),
        ("--optimizer adamw --no-embeddings", "is about blocks"),
        ("--optimizer came --base adafactor", "is about blocks"),
        ("--optimizer adamw --rank 4", "--rank is about projections"),
        ("--gap 4", "--gap is about projections"),
        ("--optimizer lamb --scale 1", "--scale is about projections"),
        ("--optimizer golore --base adamw", "is about blocks"),
        ("--ranks 2", "give both"),
        ("--reference", "runs on one process"),
        ("--gather-images", "is about galore and golore"),
        ("--optimizer galore --plugin hybrid --gather-images", "is about galore and golore"),
        (f"--text {SCRIPT}", "takes a .txt or .jsonl file"),
        (f"--model {SCRIPT.parent}", "has no config.json"),
        (f"--model {SCRIPT.parent} --tokenizer byte", "has its own tokenizer"),
    ],
)
def test_flags_that_contradict_are_refused(flags: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(*flags.split())


def test_reference_refuses_loss_scaling() -> None:
    with pytest.raises(SettingsError, match="no loss scaling"):
        settings("--reference", "--precision", "fp16", world_size=1)


@pytest.mark.parametrize("flags", ["--resume", "--checkpoint-every 5"])
def test_reference_keeps_no_checkpoints(flags: str) -> None:
    with pytest.raises(SettingsError, match="keeps no checkpoints"):
        settings("--reference", *flags.split(), world_size=1)


def test_wrong_flags_end_every_rank_with_the_same_code_and_one_message() -> None:
    """No rank reaches a collective, where the others would wait for it."""
    outputs = []
    for rank in ("0", "1"):
        env = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--tp", "2"], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2
        outputs.append(done.stdout + done.stderr)
    assert "Error: --tp 2 needs --plugin hybrid" in outputs[0]
    assert outputs[1] == ""


def test_data_ranks_and_micro_batch_follow_the_mesh() -> None:
    given = settings("--plugin", "hybrid", "--tp", "2", "--batch-size", "16", "--accumulate", "2", world_size=4)
    assert (given.data_ranks, given.zero_ranks, given.micro_batch) == (2, 2, 4)


def test_paragraphs_of_the_default_text_are_unique_prose() -> None:
    """CPython's topics repeat each other: undone, a quarter of the held-out text would also be trained on."""
    paragraphs = read_paragraphs()
    assert len(set(paragraphs)) == len(paragraphs)
    assert sum(map(len, paragraphs)) > 200_000
    assert not any("::=" in paragraph or paragraph.endswith("=====") for paragraph in paragraphs)


def test_split_keeps_every_paragraph_once() -> None:
    paragraphs = [f"paragraph {index}" for index in range(1000)]
    train, held_out = split_paragraphs(paragraphs)
    pieces = [line for text in [*train, *held_out] for line in text.split("\n")]
    assert sorted(pieces) == sorted(paragraphs)
    assert 0.05 < len("".join(held_out)) / len("".join(paragraphs)) < 0.15


def test_byte_tokenizer_returns_any_text() -> None:
    tokenizer = train_tokenizer("byte", 1024, ["only ascii"])
    text = "naive: na\u00efve \u2192 \u4e2d"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_batches_are_pure_in_seed_and_step() -> None:
    corpus = load_corpus(None, None, "byte", 1024, 32, held_out_batch=16)
    assert torch.equal(corpus.batch(3, 4, seed=1), corpus.batch(3, 4, seed=1))
    assert not torch.equal(corpus.batch(3, 4, seed=1), corpus.batch(4, 4, seed=1))
    assert not torch.equal(corpus.batch(3, 4, seed=1), corpus.batch(3, 4, seed=2))
    assert corpus.held_out.shape[0] % 16 == 0


def test_jsonl_texts_are_read_and_wrong_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}), encoding="utf-8")
    assert read_paragraphs(path) == ["one", "two"]
    path.write_text('{"text": "one"}\n{"texts": "two"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2"):
        read_paragraphs(path)


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words\n\nand no more", encoding="utf-8")
    with pytest.raises(ValueError, match="Use a longer text"):
        load_corpus(path, None, "byte", 1024, 128, held_out_batch=16)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--precision bf16", 2 * 1000 + 16 * 100 // 2),
        ("--precision fp32", 4 * 1000 + 16 * 100 // 2),
        ("--plugin ddp --precision bf16", 2 * 1000 + 16 * 100),
        ("--plugin ddp --precision fp32", 4 * 1000 + 12 * 100),
    ],
)
def test_formula_counts_weights_and_what_is_active(flags: str, expected: int) -> None:
    assert expected_bytes(settings(*flags.split()), 1000, 100) == expected


def test_losses_keep_all_digits_and_the_comparison_finds_the_step(tmp_path: Path) -> None:
    first, second = Curve(), Curve()
    for curve, change in ((first, 0.0), (second, 1e-15)):
        curve.add(Point(step=0, loss=None, held_out=1 / 3, block=""))
        curve.add(Point(step=1, loss=0.1, held_out=None, block="head"))
        curve.add(Point(step=2, loss=0.7 + change, held_out=0.2, block="embedding"))
    for curve, name in ((first, "first"), (second, "second")):
        write_losses(curve, tmp_path / name)
    read = read_losses(tmp_path / "first")
    assert read[("held_out", 0)] == 1 / 3
    difference, column, step = largest_difference(read, read_losses(tmp_path / "second"))
    assert (column, step) == ("loss", 2)
    assert 0 < difference < 2e-15
    del read[("loss", 1)]
    with pytest.raises(ValueError, match="same steps"):
        largest_difference(read, read_losses(tmp_path / "second"))


def few_paragraphs(path: Path | None = None) -> list[str]:
    """Every eighth of the default text, of which a run would evaluate the held-out tenth a dozen times."""
    return read_paragraphs(path)[:: 8 if path is None else 1]


def _train(flags: list[str], world_size: int, stop: bool = False) -> None:
    """One rank of a run; with `stop`, the last rank is asked to stop before the first step."""
    data.read_paragraphs = few_paragraphs
    stop_request.received = stop and int(os.environ["RANK"]) == world_size - 1
    run(settings(*flags, world_size=world_size), started=0.0)


def _losses(folder: Path, flags: list[str], *, ranks: int = 2) -> dict[tuple[str, int], float]:
    """Losses of a run on `ranks` ranks, or with --reference on one."""
    num_processes = 1 if "--reference" in flags else ranks
    run_ranks(num_processes, _train, [*flags, "--output", str(folder)], num_processes)
    return read_losses(folder / "losses.csv")


@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        # Means of losses are added in another order, in float64; everything else is bitwise the same.
        ([*SMALL], 1e-14),
        ([*SMALL, "--zero-stage", "1", "--accumulate", "2"], 1e-14),
        ([*SMALL, "--plugin", "ddp"], 1e-14),
        ([*ONE_BLOCK, "--optimizer", "adamw"], 1e-14),
        # LAMB's norms are sums over the ranks' parts: float32 adds them in another order.
        ([*ONE_BLOCK, "--optimizer", "lamb"], 1e-3),
        # So are the rows, columns and norms of these.
        ([*ONE_BLOCK, "--optimizer", "adafactor"], 1e-3),
        ([*ONE_BLOCK, "--optimizer", "came"], 1e-3),
        ([*SMALL, "--base", "adafactor"], 1e-3),
        # Means of images are images of means up to float32's rounding, 1e-7, which Adam's division by small moments
        # enlarges; in bf16 they travel with 8 bits.
        *(([*ONE_BLOCK, *PROJECTED, "--optimizer", name], 1e-4) for name in LOW_RANK),
    ],
    ids=[
        "badam-zero2",
        "badam-zero1-accumulate",
        "badam-ddp",
        "adamw-zero2",
        "lamb-zero2",
        "adafactor-zero2",
        "came-zero2",
        "badam-adafactor-zero2",
        *(f"{name}-zero2" for name in LOW_RANK),
    ],
)
def test_two_ranks_give_the_losses_of_one_process(flags: list[str], bound: float, tmp_path: Path) -> None:
    ranks = _losses(tmp_path / "ranks", [*flags, "--no-save"])
    reference = _losses(tmp_path / "one", [*flags, "--reference", "--no-save"])
    assert largest_difference(ranks, reference)[0] <= bound
    assert ranks[("held_out", 6)] < ranks[("held_out", 0)]


@pytest.mark.parametrize(
    "flags",
    [[], ["--plugin", "hybrid", "--tp", "2"], ["--plugin", "ddp"]],
    ids=["zero2", "tp2", "ddp"],
)
def test_saved_model_loads_and_has_the_held_out_loss(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that a run leaves is all that transformers needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = _losses(tmp_path, [*SMALL, *flags])
    # As in the run: ColossalAI's plugins cast the rotary frequencies, which are not saved, together with the weights.
    # What they save loads with eager attention unless told otherwise.
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16, attn_implementation="sdpa")
    model.bfloat16()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(data, "read_paragraphs", few_paragraphs)
    corpus = load_corpus(None, None, "bpe", 1024, 16, held_out_batch=16)
    assert tokenizer.get_vocab() == corpus.tokenizer.get_vocab()
    with torch.no_grad():
        batches = corpus.held_out.view(-1, 8, 16)
        mean = sum(model(input_ids=batch, labels=batch).loss.item() for batch in batches) / len(batches)
    # bf16 logits of tensor-parallel halves are added in another order: 2^-8 of a loss of 7, averaged.
    assert mean == pytest.approx(losses[("held_out", 6)], abs=1e-2 if "hybrid" in flags else 1e-9)


def test_a_run_leaves_curve_table_and_losses(tmp_path: Path) -> None:
    _losses(tmp_path, [*SMALL, "--no-save"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    ratio = re.search(r"\(([\d.]+) of the formula\)", table)
    assert ratio is not None
    assert float(ratio[1]) == pytest.approx(1, abs=5e-4)
    assert "1 all_gather_into_tensor" in table
    assert not (tmp_path / "model").exists()
    with (tmp_path / "losses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(7)]
    assert len({row["block"] for row in rows[1:]}) == 3


@pytest.mark.parametrize("optimizer", ["badam", "lamb"])
def test_events_have_losses_and_what_the_optimizer_says(optimizer: str, tmp_path: Path) -> None:
    """And are of the same run: the losses are those without events; a run that goes on adds to them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = [*(SMALL if optimizer == "badam" else [*ONE_BLOCK, "--optimizer", optimizer]), "--no-save"]
    flags += ["--checkpoint-every", "4"]
    without = _losses(tmp_path / "without", flags)
    with_events = [*flags, "--tensorboard", str(tmp_path / "events")]
    assert _losses(tmp_path / "with", with_events) == without
    run_ranks(2, _train, [*with_events, "--output", str(tmp_path / "with"), "--resume"], 2)
    found = accumulator.EventAccumulator(str(tmp_path / "events"))
    found.Reload()
    read = {name: {event.step: event.value for event in found.Scalars(name)} for name in found.Tags()["scalars"]}
    assert sorted(read["loss/train"]) == [1, 2, 3, 4, 5, 6]
    for step, loss in read["loss/train"].items():
        assert loss == pytest.approx(without[("loss", step)], rel=1e-6)
    assert read["loss/held_out"].keys() == {3, 6}
    assert all(rate > 0 for rate in read["tokens_per_second"].values())
    # The first step of a block is measured otherwise: with badam that is step 3.
    recorded = {6} if optimizer == "badam" else {3, 6}
    names = {"weight_norm", "gradient_norm", "update_rms", "bytes_sent"}
    if optimizer == "lamb":
        names |= {"trust_ratio/min", "trust_ratio/median", "trust_ratio/max"}
    assert {name for name in read if name.startswith("optimizer/")} == {f"optimizer/{name}" for name in names}
    for name in names:
        assert read[f"optimizer/{name}"].keys() == recorded
        assert all(value > 0 for value in read[f"optimizer/{name}"].values()) or name == "bytes_sent"
    assert (read["optimizer/bytes_sent"][6] > 0) == (optimizer == "lamb")


def test_without_tensorboard_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install tensorboard"):
        require_tensorboard()


def test_local_model_and_text_are_trained(tmp_path: Path) -> None:
    """The model that one run saved is the next one's start; without --embeddings only its layers train."""
    first = _losses(tmp_path / "first", SMALL)
    text = tmp_path / "own.txt"
    text.write_text("\n\n".join(few_paragraphs()), encoding="utf-8")
    own = ["--model", str(tmp_path / "first" / "model"), "--text", str(text), "--no-save"]
    second = _losses(tmp_path / "second", [*SMALL, *own])
    # Not exactly: what ColossalAI saves loads with eager attention, which rounds to bf16 elsewhere.
    assert second[("held_out", 0)] == pytest.approx(first[("held_out", 6)], abs=1e-3)
    blocks = {row["block"] for row in csv.DictReader((tmp_path / "second" / "losses.csv").open(encoding="utf-8"))}
    assert blocks == {"", "model.layers.0", "model.layers.1"}


def test_a_stop_asked_on_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    run_ranks(2, _train, [*SMALL, "--output", str(tmp_path)], 2, True)
    assert max(step for _, step in read_losses(tmp_path / "losses.csv")) == 1
    assert not (tmp_path / "model").exists()


def test_interrupt_ends_without_a_stack_trace(tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text("\n\n".join(few_paragraphs()), encoding="utf-8")
    command = [sys.executable, "-u", str(SCRIPT), *SMALL, "--reference", "--steps", "100000", "--eval-every", "1"]
    process = subprocess.Popen(
        [*command, "--text", str(text), "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.readline()
    assert output.startswith("step ")
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=300)[0]
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "stopped after step" in output


def test_an_interrupted_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    straight = _losses(tmp_path / "straight", [*SMALL, "--no-save"])
    flags = [*SMALL, "--no-save", "--output", str(tmp_path / "stopped")]
    run_ranks(2, _train, flags, 2, True)
    run_ranks(2, _train, [*flags, "--resume"], 2)
    assert read_losses(tmp_path / "stopped" / "losses.csv") == straight
    # Checkpointed in between, it goes on from there, on another number of ranks; averages are rounded otherwise.
    flags = [*SMALL, "--no-save", "--output", str(tmp_path / "killed"), "--checkpoint-every", "4"]
    run_ranks(2, _train, flags, 2)
    (tmp_path / "killed" / "losses.csv").unlink()
    run_ranks(1, _train, [*flags, "--resume"], 1)
    resumed = read_losses(tmp_path / "killed" / "losses.csv")
    assert resumed[("held_out", 3)] == straight[("held_out", 3)]
    assert resumed[("held_out", 6)] == pytest.approx(straight[("held_out", 6)], abs=1e-3)


def test_resume_refuses_other_flags_and_a_finished_run(tmp_path: Path) -> None:
    flags = [*SMALL, "--no-save", "--output", str(tmp_path), "--checkpoint-every", "3"]
    run_ranks(1, _train, flags, 1)
    with pytest.raises(RankError, match=r"of a run with --lr 0\.006\. Give the same flags"):
        run_ranks(1, _train, [*flags, "--resume", "--lr", "0.5"], 1)
    with pytest.raises(RankError, match="has taken all of its 6 steps"):
        run_ranks(1, _train, [*flags, "--resume"], 1)
