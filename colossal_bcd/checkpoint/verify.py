"""Comparing checksums, while the other ranks wait."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from colossal_bcd.checkpoint.errors import together
from colossal_bcd.checkpoint.files import check_file


def verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Let one rank read all files; the ranks meet after each, so that none waits for longer than a file takes.

    Args:
        folder: where they are.
        files: what the manifest says of each.
    Raises:
        CheckpointError: on every rank, of the first file that is damaged.
    """
    names = [sorted(files)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(names, src=0)
    for name in names[0]:
        with together():
            if dist.get_rank() == 0:
                check_file(folder / name, files[name], contents=True)
