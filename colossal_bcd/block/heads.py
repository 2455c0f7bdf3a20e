"""Fresh heads of a task that default blocks would leave as they were initialised."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import Tensor

from colossal_bcd.block.log import is_first
from colossal_bcd.names import HEAD_NAMES

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
    """Parameters of heads for a task, by the prefix of each head.

    A head over the vocabulary, pretrained like the layers below, is none whatever its name is.

    Args:
        parameters: of the model, by name.
        untrained: names among which heads are sought.
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
    """Say it where the head of a task stays as it was initialised.

    Args:
        parameters: of the model, by name.
        untrained: names of what may be trained and is not.
        remedy: what trains them; None: `active_modules` of a BlockOptimizer.
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
