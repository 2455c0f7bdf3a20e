"""What torch.distributed.checkpoint.state_dict cannot save, and is told before it changes anything."""

from __future__ import annotations

import sys


def refuse_torch_checkpoint(owner: str, remedy: str) -> None:
    """Refuse torch's get_optimizer_state_dict and set_optimizer_state_dict; called where `state` is read.

    They keep "state" and "param_groups" by the names of parameters in the model.  Masters, which block is active and
    for how long, and the state that waits would be dropped without a word, and where there is no state yet, right after
    a switch, they take a step on zero gradients.  The first thing that they do is to look at `state`.

    Args:
        owner: the optimizer's class.
        remedy: how to save it.
    Raises:
        ValueError: the caller's caller is one of them.
    """
    if sys._getframe(2).f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
        raise ValueError(
            f"{owner}: got torch.distributed.checkpoint.state_dict (get_, set_optimizer_state_dict), which would drop "
            f"masters and the progress of blocks and take a step of its own, expected another way to save. {remedy}"
        )
