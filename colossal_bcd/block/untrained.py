"""What stays as it is although nobody meant that: fresh heads in no block, and blocks that backward does not reach."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.log import is_first
from colossal_bcd.block.trained import Trained
from colossal_bcd.names import HEAD_NAMES
from colossal_bcd.sharding import Mesh

logger = logging.getLogger(__name__)

_OF_LANGUAGE_MODELS = frozenset((
    "lm_head", "embed_out", "output_layer", "cls", "vocab_transform", "vocab_layer_norm", "vocab_projector",
))  # fmt: skip
_OF_TASKS = (HEAD_NAMES - _OF_LANGUAGE_MODELS) | {
    "logits_proj", "sequence_summary", "multiple_choice_head", "v_head", "value_head", "reward_head", "score_head",
    "regressor", "bbox_predictor",
}  # fmt: skip
"""Name components of heads that the models of the Hugging Face hub make anew for a task."""
_WORDS = frozenset(("embed_tokens", "word_embeddings", "wte", "embed_in", "tok_embeddings", "shared", "tok_emb"))


def task_heads(parameters: Mapping[str, Tensor], untrained: Collection[str]) -> dict[str, list[str]]:
    """Parameters of heads for a task that are among `untrained`, by the prefix of each head.

    A head over the vocabulary, pretrained like the layers below, is none whatever its name is.
    """
    heads: dict[str, list[str]] = {}
    for name in parameters:
        if name not in untrained:
            continue
        components = name.split(".")
        number = next((index for index, part in enumerate(components) if part.isdecimal()), len(components) - 1)
        for index, component in enumerate(components[:number]):
            if component in _OF_TASKS or "classif" in component:
                heads.setdefault(".".join(components[: index + 1]) + ".", []).append(name)
                break
    words = {
        param.shape[0]
        for name, param in parameters.items()
        if param.dim() == 2 and _WORDS.intersection(name.split("."))
    }
    found = {
        prefix: names
        for prefix, names in heads.items()
        if not any(parameters[name].dim() == 2 and parameters[name].shape[0] in words for name in names)
    }
    # Beside a head a pooler is new, too (DeBERTa); within the pretrained model it is pretrained (BERT).
    pooler = [name for name in parameters if name in untrained and name.startswith("pooler.")]
    return {"pooler.": pooler, **found} if found and pooler else found


def warn_of_heads(parameters: Mapping[str, Tensor], untrained: Collection[str], remedy: str | None = None) -> None:
    """Say it where the head of a task, among `untrained`, stays as it was initialised.

    `remedy` is what trains it; None: `active_modules` of a BlockOptimizer.
    """
    heads = task_heads(parameters, untrained)
    if not heads or not is_first():
        return
    names = [name for each in heads.values() for name in each]
    active = ", ".join(f'"{prefix}"' for prefix in heads)
    logger.warning(
        "%s %s in no block and will stay as initialised, although the model's predictions are made by %s. "
        "Pass %s to train %s in every step, or freeze %s before if this is meant.",
        ", ".join(names),
        *(("is", "it") if len(names) == 1 else ("are", "them")),
        remedy or f"active_modules=[{active}]",
        *(("it", "it") if len(names) == 1 else ("them", "them")),
    )


CAUSES = (
    "Either the forward pass used none of it, as an image tower in steps of text, or something cut the graph: "
    "torch.no_grad() or detach() in the model, or reentrant gradient checkpointing by another function than torch's "
    "(use a non-reentrant one, or model.enable_input_require_grads())."
)


class Reach:
    """Notes which groups of parameters (blocks, or layers, as `noun` says) get gradients; says once what gets none.

    What it is told must be the same on all data-parallel ranks: whether any of them has a gradient.
    """

    def __init__(self, noun: str = "block") -> None:
        self._noun = noun
        self._said: set[str] = set()
        self._without: set[str] = set()
        """Groups whose period has ended without a gradient, as long as no group ever had one."""
        self._ever, self._others = False, False

    def note(self, step: int, groups: Mapping[str, Mapping[str, bool]], others: bool) -> None:
        """Look at a step, and say at its first occurrence that a group, or a part of one, has no gradient.

        Args:
            step: its number, for the line.
            groups: group -> name -> whether the parameter has a gradient.
            others: whether something that is in no group has one.
        """
        self._others |= others
        for group, had in groups.items():
            missing = [name for name, present in had.items() if not present]
            self._ever |= len(missing) < len(had)
            subject = f"parameters of {self._noun} {group}"
            if had and len(missing) == len(had):
                self._say("all", logging.WARNING, f"step {step}: none of the {subject} has a gradient. {CAUSES}")
            elif missing:
                names = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
                text = f"step {step}: {len(missing)} of {len(had)} {subject} have no gradient: {names}"
                self._say("some", logging.INFO, text)

    def look(self, trained: Trained, *, by_stage: bool = False) -> None:
        """Before a step, when every master has its gradient; the masters of an engine have that of any rank.

        With `by_stage` only some of the blocks have parameters on this rank.
        """
        tensors, named = trained.active_set.masters, trained.named_parameters
        groups, grouped = dict[str, dict[str, bool]](), set[Parameter]()
        for block in trained.active_blocks():
            # Whether the schedule is that of the other ranks is found out at the switch, not here.
            members = {name: named[name] for name in block.parameters if named.get(name) in tensors}
            groups[block.name] = {name: tensors[param].grad is not None for name, param in members.items()}
            grouped.update(members.values())
        others = any(tensor.grad is not None for param, tensor in tensors.items() if param not in grouped)
        self.note(trained.num_steps, groups, others)
        if trained.schedule.is_switch(trained.num_steps + 1) and not by_stage:
            self.end(groups, [block.name for block in trained.blocks])

    def end(self, ended: Collection[str], every: Sequence[str]) -> None:
        """Refuse to go on where every group has had its period and none has had a gradient, but something else has.

        The period of the groups that have `ended` is over.
        """
        if self._ever:
            return
        self._without.update(ended)
        if self._others and self._without.issuperset(every):
            raise ValueError(
                f"every one of the {len(every)} {self._noun}s was active, and none got a gradient in any step, while "
                f"other parameters got some: backward does not reach the {self._noun}s. {CAUSES}"
            )

    def _say(self, kind: str, level: int, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            if Mesh().is_first:
                logger.log(level, message)
