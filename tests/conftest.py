import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from full import LONG, waits
from needs import ignored

from colossal_bcd.testing import start_server

# On a machine that does much else a rank may be late; the tests that need the time limit set their own.
os.environ.setdefault("COLOSSAL_BCD_TIMEOUT", "600")
torch.set_num_threads(1)
# At the end, where examples/badam.py does not stand before the original package.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
# Nor is a slow machine an error of a test that draws its cases.  Every run draws the same ones, so that none fails by
# chance; `pytest --hypothesis-profile search` draws others.
for profile in ("the same", "search"):
    hypothesis.settings.register_profile(
        profile,
        derandomize=profile == "the same",
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("the same")
# Importing ColossalAI would start processes that wait for kernels to compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


collect_ignore = ignored()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    mark_full(items)
    # Workers take files in this order: none is left with a long one when the others have ended.
    items.sort(key=lambda item: LONG.index(file) if (file := file_of(item)) in LONG else len(LONG))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


def file_of(item):
    return item.nodeid.partition("::")[0].removeprefix("tests/")


def mark_full(items):
    """Cases named in `FULL` wait for `make test-full`."""
    for item in items:
        if waits(item.nodeid) is not None:
            item.add_marker("full")


def pytest_collection_finish(session):
    """Ranks are forked from a process that has imported what the collected tests have; it does while the first run.

    What has been imported here is left out of later collections, of which tests of memory make many.
    """
    gc.collect()
    gc.freeze()
    modules = {item.module for item in session.items}
    if session.config.option.collectonly or not any(hasattr(module, "run_ranks") for module in modules):
        return
    here = Path(__file__).parent
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    start_server(
        *(name for name, file in files.items() if file and Path(file).is_relative_to(here) and name != "conftest")
    )


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """Numbers below 2^-126 are numbers: what a test compiles may link a library that takes them for zeros, for good."""
    yield
    torch.set_flush_denormal(False)
