"""Dropout of activations that are the same on all tensor-parallel ranks: one mask for all of them.

ColossalAI's policies of GPT-2, GPT-J, BERT, BLIP-2 and T5 let every rank draw a mask of its own for the output of
attention and of the MLP, too, which all ranks have whole: hidden states, and LayerNorms with them, would drift apart.
So they would where ranks were seeded apart, as data-parallel ones often are.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from colossalai.shardformer.layer import DropoutForParallelInput, DropoutForReplicatedInput
from colossalai.shardformer.layer.utils import create_randomizer_with_offset
from torch import nn
from torch.distributed import ProcessGroup

from colossal_bcd.engine.agreement import gathered

LAST = ("c_proj", "fc_out")
"""Layers that end a module with divided columns, and after which its dropout comes."""


def share_masks(model: nn.Module, tp_group: ProcessGroup) -> None:
    """Let all ranks draw the same mask, by the seed of the first one, where they have the same values.

    All ranks of the group must call.

    Args:
        model: as ColossalAI has divided it, without sequence parallelism, which divides these activations, too.
        tp_group: over which.
    """
    seed = gathered(torch.random.initial_seed(), tp_group)[0]
    for parent in model.modules():
        children = dict(parent.named_children())
        divides = any(type(child).__name__.endswith("_Col") for child in children.values())
        for name, child in children.items():
            divided = isinstance(child, DropoutForParallelInput) and is_of_part(name, children, divides)
            if isinstance(child, (DropoutForParallelInput, DropoutForReplicatedInput)) and not divided:
                child.randomizer = create_randomizer_with_offset(seed, process_group=tp_group, offset_by_rank=False)


def is_of_part(name: str, siblings: Container[str], divides: bool) -> bool:
    """Whether a dropout's input is this rank's heads or columns.

    Args:
        name: of the dropout in its module.
        siblings: names in the same module.
        divides: whether a layer whose columns are divided is among them.
    """
    if "attn" in name or "attention" in name:
        return True
    return divides and name != "resid_dropout" and not any(last in siblings for last in LAST)
