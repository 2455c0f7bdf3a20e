"""The comparison of BREAD with BAdam trains every method and writes its table."""

import bread_vs_badam
import pytest
from data import load_corpus


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(None, None, "byte", 257, bread_vs_badam.LENGTH, bread_vs_badam.HELD_OUT)


@pytest.mark.parametrize("name", bread_vs_badam.METHODS)
def test_bread_example_trains(name, corpus, tmp_path):
    run = bread_vs_badam.train(name, 3e-3, 0, 10, corpus)
    assert run.final < run.losses[0][1]
    assert run.peak > 0
    text = bread_vs_badam.table({name: (3e-3, [run])}, {name: 1000}, "head")
    assert f"| {name} | 0.003 | {run.final:.3f} (0.000) |" in text
    bread_vs_badam.plot({name: (3e-3, [run])}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
