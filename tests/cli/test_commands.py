"""The command as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from colossal_bcd.cli.commands import cli

ROOT = Path(__file__).parents[2]
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 250,
    "max_position_embeddings": 128,
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), env={"COLUMNS": "120"})


def read(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    assert values["version"] == 1
    return values


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def test_estimate_rows_add_up_and_the_json_is_as_documented(config: str) -> None:
    (found,) = read("estimate", config, "-o", "came", "--gpus", "2", "--zero", "2")["estimates"]
    assert set(found) == {"model", "optimizer", "mesh", "run", "bytes", "peak", "fits", "traffic"}
    for moment in found["bytes"].values():
        assert moment["total"] == sum(value for name, value in moment.items() if name != "total")
    assert found["peak"] == max(moment["total"] for moment in found["bytes"].values())
    assert found["fits"] == {"24": True, "40": True, "80": True, "141": True}
    page = (ROOT / "docs/command_line.md").read_text()
    keys = [*found, *found["bytes"], *found["bytes"]["step"], *found["traffic"], *found["run"], *found["mesh"]]
    assert [key for key in keys if f"`{key}`" not in page] == []


def test_estimate_takes_a_folder_and_says_the_same_as_of_the_file(config: str) -> None:
    assert (
        read("estimate", str(Path(config).parent))["estimates"][0]["peak"]
        == read("estimate", config)["estimates"][0]["peak"]
    )


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-2-7b", 6_738_415_616),
        ("smollm2-135m", 134_515_008),
        ("roberta-large", 355_412_057),
    ],
)
def test_presets_have_the_published_sizes(preset: str, parameters: int) -> None:
    assert read("partition", preset)["model"]["parameters"] == parameters


def test_every_optimizer_has_an_estimate(config: str) -> None:
    from colossal_bcd.cli.optimizers import choices

    found = read("estimate", config, "--rank", "8", "--compare", ",".join(choices()))["estimates"]
    by_name = {each["optimizer"]["name"]: each["bytes"]["step"]["states"] for each in found}
    assert by_name["adamw"] == 8 * found[0]["model"]["parameters"]
    assert by_name["sgd"] == 0 < by_name["adafactor"] < by_name["galore"] < by_name["came"] < by_name["adamw"]
    assert by_name["galore"] == by_name["golore"] == by_name["galoreadamw"]


@pytest.mark.parametrize(
    "mesh",
    [
        ("--gpus", "4", "--tp", "2", "--zero", "1"),
        ("--gpus", "4", "--sharded-weights", "--tp", "2"),
        ("--gpus", "2", "--pp", "2"),
    ],
    ids=["tp and zero", "fsdp and tp", "pp"],
)
def test_meshes_divide_bytes(config: str, mesh: tuple[str, ...]) -> None:
    whole, divided = read("estimate", config)["estimates"][0], read("estimate", config, *mesh)["estimates"][0]
    assert divided["bytes"]["step"]["weights"] < whole["bytes"]["step"]["weights"]
    assert divided["bytes"]["step"]["states"] < whole["bytes"]["step"]["states"]


def test_plot_is_a_picture(config: str, tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    result = run("estimate", config, "--compare", "adamw,badam", "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_a_terminal(config: str, columns: int) -> None:
    for arguments in (
        ["estimate", config],
        ["estimate", config, "--compare", "adamw,lora,galore,badam"],
        ["explain", config],
    ):
        result = CliRunner().invoke(cli, arguments, env={"COLUMNS": str(columns)})
        assert result.exit_code == 0, result.output
        assert max(map(len, result.stdout.splitlines())) <= columns
        assert "…" not in result.stdout


def test_partition_has_every_parameter_once(config: str) -> None:
    found = read("partition", config, "--blocks", "2", "--embedding", "--head")
    inside = sum(block["parameters"] for block in found["blocks"])
    assert inside + sum(found["in_no_block"].values()) == found["model"]["parameters"]
    assert found["blocks"][0]["name"] == "embedding"
    assert len(found["blocks"]) == 4


def test_explain_counts_the_bytes_of_estimate(config: str) -> None:
    mesh = ("-o", "came", "--gpus", "2", "--zero", "2")
    rows = read("explain", config, *mesh)["parameters"]
    (found,) = read("estimate", config, *mesh)["estimates"]
    assert sum(row["bytes"] for row in rows) == found["bytes"]["step"]["masters"] + found["bytes"]["step"]["states"]
    assert {row["rounds"] for row in rows if "norm" not in row["parameter"]} == {3}
    assert {row["rule"] for row in rows} == {"CAME"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["estimate", "llama-3-9b"], "Presets like it: llama-3-8b"),
        (["estimate", "{empty}"], "has no config.json"),
        (["estimate", "{config}", "-o", "lambb"], "Closest is lamb"),
        (["estimate", "{config}", "--gpus", "3", "--tp", "2"], "expected a multiple of tp x pp = 2"),
        (["estimate", "{config}", "--gpus", "3", "--tp", "3"], "Choose a tp_size that divides it"),
        (["estimate", "{config}", "--zero", "3"], "Stage 3 is --sharded-weights"),
        (["estimate", "{config}", "--length", "4096"], "expected at most the 128 positions"),
        (["estimate", "{config}", "--batch", "0"], "--batch: got 0, expected 1 or more"),
        (["estimate", "{config}", "--compare", ","], "such as adamw,galore,badam"),
        (["estimate", "{config}", "--precision", "int4"], "See: "),
        (["estimate"], "Missing argument 'MODEL'"),
        (["estimate", "{config}", "--blocks", "9", "--no-masters"], "Leave it out"),
        (["estimate", "{config}", "-o", "lora", "--gpus", "2", "--tp", "2"], "Leave one of them out"),
        (["estimate", "roberta-large", "--gpus", "2", "--tp", "2"], "without a plan of tensor parallelism"),
        (["estimate", "{config}", "--plot", "memory.docx"], "docx"),
        (["partition", "{config}", "--blocks", "0"], "--blocks"),
        (["explain", "{config}", "--match", "nothing"], "Take a part of one"),
        (["explain", "{config}", "--pp", "5", "--gpus", "4"], "expected a multiple"),
        (["verify", "llama-3-8b", "--gpus", "2", "--zero", "2"], "Shrink it: --layers 2"),
        (["verify", "{config}"], "Take --gpus 2 --zero 2"),
        (["verify", "{config}", "--gpus", "2", "--zero", "1", "--width", "7"], "--width: got 7"),
        (["doctor", "--timeout", "none"], "--timeout"),
        (["docter"], "No such command"),
    ],
    ids=lambda each: " ".join(each[:4]) if isinstance(each, list) else "",
)  # fmt: skip
def test_wrong_input_is_one_line_that_says_what_to_do(
    config: str, tmp_path: Path, arguments: list[str], said: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run(*(each.format(config=config, empty=empty) for each in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_configs_that_are_none_are_refused(tmp_path: Path) -> None:
    for text, said in (
        ("{", "is no JSON"),
        ("{}", "has no model_type"),
        ('{"model_type": "nothing"}', "does not take"),
    ):
        path = tmp_path / "config.json"
        path.write_text(text)
        result = run("estimate", str(path))
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert said in result.stderr


def test_help_of_every_command_says_what_it_is_for() -> None:
    for name, command in cli.commands.items():
        result = run(name, "--help")
        assert result.exit_code == 0
        assert command.help
        assert all(option.help for option in command.params if option.param_type_name == "option")


@pytest.mark.parametrize(
    "arguments",
    [("-o", "galore", "--rank", "8", "--zero", "2"), ("-o", "badam", "--sharded-weights")],
    ids=["galore-zero2", "badam-fsdp2"],
)
def test_verify_writes_a_certificate(config: str, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    if "--zero" in arguments:
        pytest.importorskip("colossalai", reason="ZeRO 2 is that of its plugins")
    path = tmp_path / "certificate.json"
    said = read("verify", config, "--gpus", "2", *arguments, "--lr", "0.01", "--output", str(path))
    assert said == json.loads(path.read_text())
    assert said["verdict"] == "equal"
    assert said["model"]["config"]["hidden_size"] == 64
    assert max(each["error"] for each in said["tensors"].values()) <= 1e-12
    assert sum(each["moved"] > 1e-3 for each in said["tensors"].values()) >= 27


def test_verify_tells_a_difference(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs by more than the bound fails, and so does what is no number."""
    from colossal_bcd.cli import certificate

    for spoiled in (1e-9, float("inf")):
        results = iter([[{"w": {"shape": [2], "largest": 1.0, "moved": 1.0}}], [{"w": spoiled}]])
        monkeypatch.setattr(certificate, "run_ranks", lambda *_, results=results, **__: next(results))
        result = run("verify", config, "--gpus", "2", "--zero", "1", "--output", str(tmp_path / "c.json"))
        assert result.exit_code == 1
        assert "different" in result.stdout


def test_doctor_passes_here_and_says_so() -> None:
    result = run("doctor", "--json")
    values = json.loads(result.stdout)
    assert (result.exit_code, values["passed"], values["failure"]) == (0, True, None)
    assert set(values["errors"]) >= {"AdamW", "Lamb", "Adafactor", "CAME", "GaLoreAdamW"}


def test_doctor_fails_with_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    from colossal_bcd.cli import self_test
    from colossal_bcd.testing import RankError

    def late(*_: Any, **__: Any) -> Any:
        raise RankError("--- rank 1\nstill running when time was up")

    monkeypatch.setattr(self_test, "run_ranks", late)
    result = run("doctor")
    assert result.exit_code == 1
    assert "still running when time was up" in result.stdout
    assert "do not train with this installation" in result.stdout


def test_module_runs_as_the_command_and_missing_click_is_one_line() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run_it: Any = {"capture_output": True, "text": True, "env": environment, "check": False}
    shown = subprocess.run([sys.executable, "-m", "colossal_bcd", "--version"], **run_it)
    assert shown.stdout.startswith("colossal-bcd, version ")
    code = "import sys; sys.modules['click'] = None; from colossal_bcd.cli import main; main()"
    missing = subprocess.run([sys.executable, "-c", code], **run_it)
    assert missing.returncode == 1
    assert missing.stderr == "colossal-bcd: click is not installed. Run: pip install 'colossal_bcd[cli]'\n"
