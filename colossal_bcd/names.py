"""Names of parameters: without what wrappers of modules put into them, and what a name says of its parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))
"""Name components of torch.compile and of torch's checkpoint wrapper, which may come and go between two runs."""


def plain_name(name: str) -> str:
    """The name that a parameter has where nothing is wrapped: "model.norm.weight" of "_orig_mod.model.norm.weight"."""
    return ".".join(component for component in name.split(".") if component not in WRAPPERS)


EMBEDDING_NAMES = frozenset((
    "embed_tokens", "embed_positions", "embed_in", "embed", "embedding", "embeddings", "word_embeddings",
    "word_embeddings_layernorm", "position_embeddings", "token_type_embeddings", "patch_embeddings",
    "layernorm_embedding", "tok_embeddings", "wte", "wpe", "shared",
))  # fmt: skip
"""Name components of the embeddings of models from the Hugging Face hub."""

HEAD_NAMES = frozenset((
    "lm_head", "head", "score", "classifier", "pre_classifier", "cls_classifier", "distillation_classifier",
    "classification_head", "qa_outputs", "embed_out", "output_layer", "cls", "vocab_transform", "vocab_layer_norm",
    "vocab_projector",
))  # fmt: skip
"""Name components of their heads."""


@dataclass(frozen=True)
class Role:
    """Where in the model a parameter is, by its name."""

    kind: Literal["embedding", "head", "layer", "rest"]
    layer: str | None = None
    """The name up to its first number, such as "model.layers.3"."""


def role_of(name: str) -> Role:
    """What a parameter's name tells.

    The components before the first number decide: one that names an embedding or a head, else the number makes it a
    layer ("transformer.h.0.attn.c_attn.weight" is in layer "transformer.h.0").
    """
    components = name.split(".")
    number = next((index for index, component in enumerate(components) if component.isdecimal()), None)
    for component in components[:number]:
        if component in EMBEDDING_NAMES:
            return Role("embedding")
        if component in HEAD_NAMES:
            return Role("head")
    if number is None:
        return Role("rest")
    return Role("layer", ".".join(components[: number + 1]))
