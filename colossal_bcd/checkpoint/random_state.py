"""torch's random state of every rank, for dropout; this package's own randomness is a function of seeds."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from colossal_bcd.checkpoint.errors import together
from colossal_bcd.engine.config import communication_device

logger = logging.getLogger(__name__)
FILE = "random.safetensors"


def save_random_state(folder: Path) -> None:
    """Write the state of all ranks into one file."""
    mine = {"cpu": torch.get_rng_state()}
    if communication_device().type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state()
    states: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    with together():
        if dist.get_rank() == 0:
            named = {f"{rank}.{name}": state for rank, other in enumerate(states) for name, state in other.items()}
            save_file(named, folder / FILE)


def load_random_state(folder: Path) -> None:
    """Go on with the saved state, where as many ranks saved as load."""
    with together():
        states = load_file(folder / FILE)
    rank, ranks = dist.get_rank(), len({name.partition(".")[0] for name in states})
    if ranks != dist.get_world_size():
        logger.info(
            "%d ranks saved torch's random state and %d go on: it is left as it is", ranks, dist.get_world_size()
        )
        return
    torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and communication_device().type == "cuda":
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
