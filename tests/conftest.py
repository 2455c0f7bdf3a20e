import os

import pytest
import torch

# On a machine that does much else a rank may be late; the tests that need the time limit set their own.
os.environ.setdefault("COLOSSAL_BCD_TIMEOUT", "600")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
