"""What users see of switches: by default, with logging of their own, on one of many ranks."""

import copy
import logging
import sys

import pytest
from block_net import Net, train, wrap

from colossal_bcd.block import BlockOptimizerRatio
from colossal_bcd.block.log import active_line
from colossal_bcd.testing import run_ranks

SWITCHES = ["step 0: block 0 (layers.0) of 3 is active", "step 2: block 1 (layers.1) of 3 is active"]


@pytest.fixture
def unconfigured(monkeypatch):
    """Logging as Python starts it, but for handlers that pytest goes on to put into this list of the root's."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    monkeypatch.delenv("RANK", raising=False)


def seen(capsys, verbose=1):
    model = Net()
    optimizer = wrap(model, verbose=verbose)
    train(model, optimizer, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


@pytest.mark.usefixtures("unconfigured")
def test_block_log_is_seen_where_nobody_set_up_logging(capsys):
    """Python's root logger shows warnings only: lines of level INFO were never seen by anybody."""
    logging.root.handlers.clear()
    summary = "3 blocks; 4 trainable parameters are in none and stay frozen"
    assert seen(capsys) == [f"colossal_bcd: {line}" for line in (SWITCHES[0], summary, SWITCHES[1])]
    assert seen(capsys, verbose=0) == []
    assert "colossal_bcd: trainable: layers.0.weight, layers.0.bias" in seen(capsys, verbose=2)
    assert logging.root.handlers == [], "a library sets up nothing"
    assert logging.getLogger("colossal_bcd").handlers == []


@pytest.mark.usefixtures("unconfigured")
def test_block_log_of_the_ratio_form_is_one_line_a_switch(capsys):
    logging.root.handlers.clear()
    model = Net()
    groups = [{"params": [param]} for param in model.parameters()]
    train(model, BlockOptimizerRatio(groups, list(model.named_parameters()), switch_every=2), 2)
    assert capsys.readouterr().err.splitlines() == ["colossal_bcd: step 2: the next share of every tensor trains"]


@pytest.mark.usefixtures("unconfigured")
def test_block_log_counts_what_was_frozen_before(capsys):
    """Also a copy of a wrapped model, in which all but one block looks frozen by the user."""
    logging.root.handlers.clear()
    model = Net()
    wrap(model)
    wrap(model)
    assert "frozen before" not in capsys.readouterr().err
    wrap(copy.deepcopy(model))
    assert (
        "1 blocks; 0 trainable parameters are in none and stay frozen; 8 were frozen before" in capsys.readouterr().err
    )


@pytest.mark.usefixtures("unconfigured")
def test_block_log_goes_through_handlers_that_there_are(capsys):
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mine %(levelname)s %(message)s"))
    logging.root.addHandler(handler)
    lines = seen(capsys)
    assert [line for line in lines if "active" in line] == [f"mine INFO {line}" for line in SWITCHES]
    assert len(lines) == 3


@pytest.mark.usefixtures("unconfigured")
@pytest.mark.parametrize("how", ["package", "root", "disable", "rank"])
def test_block_log_is_silent_where_that_was_decided(how, capsys, monkeypatch):
    logging.root.handlers.clear()
    if how == "package":
        monkeypatch.setattr(logging.getLogger("colossal_bcd"), "level", logging.WARNING)
    if how == "root":
        monkeypatch.setattr(logging.root, "level", logging.ERROR)
    if how == "disable":
        monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)
    if how == "rank":
        monkeypatch.setenv("RANK", "1")
    assert seen(capsys) == []


def test_block_log_names_the_stages_of_each_block():
    names, stages = ["embed", "layers.0", "layers.1"], [[0, 1], [0], [1]]
    assert active_line(4, [1], names, []) == "step 4: block 1 (layers.0) of 3 is active"
    assert active_line(4, [1, 2], names, []) == "step 4: blocks 1 (layers.0), 2 (layers.1) of 3 are active"
    line = "step 4: stage 0 trains block 1 (layers.0); stage 1 trains block 2 (layers.1) of 3"
    assert active_line(4, [1, 2], names, stages) == line
    assert active_line(4, [0], names, stages) == "step 4: stages 0, 1 train block 0 (embed) of 3"


def test_block_log_of_a_pipeline_is_written_once(tmp_path):
    """What a launcher shows of a script that leaves logging alone: each stage's block, once for all ranks."""
    pytest.importorskip("colossalai")
    import log_cases

    run_ranks(2, log_cases.show, str(tmp_path / "shown"))
    shown = (tmp_path / "shown").read_text()
    lines = [line for line in shown.splitlines() if line.startswith(("--", "colossal_bcd: step"))]
    assert lines == [
        "-- per stage",
        "colossal_bcd: step 0: block 0 (model.layers.0) of 4 is active",
        *_stages(0, 0, 2),
        *_stages(1, 1, 3),
        *_stages(2, 0, 2),
        "-- one block",
        "colossal_bcd: step 0: block 0 (model.layers.0) of 4 is active",
        *(f"colossal_bcd: step {i}: stage {i // 2} trains block {i} (model.layers.{i}) of 4" for i in range(3)),
        "-- silent",
    ]


def _stages(step, first, second):
    return [
        f"colossal_bcd: step {step}: stage 0 trains block {first} (model.layers.{first}); "
        f"stage 1 trains block {second} (model.layers.{second}) of 4"
    ]
