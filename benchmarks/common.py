"""What the benchmark programs share: the machine, a table, a small Llama, the slowest rank's time, and a text."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

# The text that ships with CPython and its batches are those of the main example.
sys.path.append(str(Path(__file__).parents[1] / "examples" / "finetune"))


def environment(*packages: str) -> str:
    """The machine and the versions of some packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f} at the "
        f"start, one thread per rank, gloo; Python {platform.python_version()}, {versions}."
    )


def row(cells: Sequence[object]) -> str:
    """Cells as a line of a markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def heading(cells: Sequence[str]) -> str:
    """The first two lines of a markdown table."""
    return row(cells) + "\n" + row(["---"] * len(cells))


def llama(hidden: int, layers: int, vocab: int = 1024, seed: int = 0, **options: Any) -> nn.Module:
    """A Llama with random weights that depend on the seed alone: the same on every rank and in every call."""
    torch.manual_seed(seed)
    sizes = {"intermediate_size": hidden * 11 // 4, "num_attention_heads": 4, "num_key_value_heads": 4, **options}
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=vocab,
        use_cache=False,
        attn_implementation="eager",
        **sizes,
    )
    return LlamaForCausalLM(config)


def seconds(work: Callable[[], Any]) -> float:
    """Duration on this rank of something that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def slowest(values: Sequence[Any]) -> Any:
    """The largest over the ranks of each number in a list, or in a list of lists of equal lengths."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
