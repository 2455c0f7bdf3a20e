"""Every optimizer and `BlockOptimizer` train on one process where ColossalAI cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from needs import needing

PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("colossalai", "transformers", "peft"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch
import colossal_bcd
from colossal_bcd import BlockOptimizer, BlockOptimizerRatio, estimate

NAMES = [name for name in colossal_bcd.__all__ if isinstance(getattr(colossal_bcd, name), type)]
made = []
for name in NAMES:
    if not issubclass(getattr(colossal_bcd, name), torch.optim.Optimizer):
        continue
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(3)))
    named = [(f"layers.{key}", param) for key, param in model.named_parameters()]
    if name == "BlockOptimizer":
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = BlockOptimizer(base, named, [["layers.0."], ["layers.1."], ["layers.2."]], switch_block_every=1)
    elif name == "BlockOptimizerRatio":
        optimizer = BlockOptimizerRatio(model.parameters(), named, update_ratio=0.5, lr=1e-2)
    else:
        matrices = [param for param in model.parameters() if param.dim() == 2]
        others = [param for param in model.parameters() if param.dim() != 2]
        rank = {"rank": 4} if name.startswith(("GaLore", "GoLore")) else {}
        options = {"relative_step": False} if "Adafactor" in name else {}
        options |= {"total_steps": 9} if name.startswith("GoLore") else {}
        groups = [{"params": matrices, **rank}, {"params": others}]
        optimizer = getattr(colossal_bcd, name)(groups, lr=1e-2, **options)
    assert estimate(optimizer).state >= 0
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(4):
        model(torch.ones(2, 24)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
    optimizer.load_state_dict(optimizer.state_dict())
    made.append(name)
assert {"AdamW", "Lamb", "CAME", "Adafactor", "GaLoreAdamW", "GoLoreSGD", "BlockOptimizer"} <= set(made), made
assert "colossalai" not in sys.modules
print(len(made))
"""


def test_every_optimizer_trains_where_colossalai_cannot_be_imported() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 14


def test_needing_follows_imports_through_support_files() -> None:
    """`make test-latest` leaves these out, and no more."""
    names = {path.name for path in needing(["colossalai", "colossal_bcd.booster"])}
    assert {"test_plugins.py", "test_checkpoints.py", "test_engine.py", "test_example.py"} <= names
    assert not {"test_layout.py", "test_block_optimizer.py", "test_conformance.py"} & names
