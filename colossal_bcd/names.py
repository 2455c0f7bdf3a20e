"""Names of parameters: without what wrappers of modules put into them, what patterns match, what a name tells."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))
"""Name components of torch.compile and of torch's checkpoint wrapper, which may come and go between two runs."""


def plain_name(name: str) -> str:
    """The name that a parameter has where nothing is wrapped: "model.norm.weight" of "_orig_mod.model.norm.weight"."""
    return ".".join(component for component in name.split(".") if component not in WRAPPERS)


Form = Literal["start", "anywhere", "expression", "part"]
_RULES: dict[Form, str] = {
    "start": "Prefixes are whole components from the start of a name: 'layers.1' is neither 'layers.10' nor "
    "'model.layers.1'.",
    "anywhere": "Patterns are whole components of a name, one after the other: 'layers.1' is not in 'layers.10'.",
    "expression": "Patterns are whole components of a name, or a regular expression for all of it.",
    "part": "Patterns are parts of a name that cut no number: 'layers.1' is not in 'layers.10'.",
}
_COMPONENTS = re.compile(r"[\w.\-]+")


@dataclass(frozen=True)
class Pattern:
    """Says which parameters or modules are meant, by their names (docs/names.md).

    What wrappers of modules put into names counts neither in the pattern nor in the names.

    Raises:
        TypeError: the text is not a string, nor a compiled regular expression where one may be.
    """

    text: str | re.Pattern[str]
    """What the user wrote."""
    form: Form = "anywhere"
    """Whole components from the "start" of a name or "anywhere" in it, with or without a '.' at the ends; "expression":
    components anywhere, or a regular expression for the whole name of a parameter or of its module, which is every text
    with other characters than letters, digits, '_', '-' and '.'; "part": any part of a name, which cuts no number."""
    subject: str = "pattern"
    """What the pattern is, for errors."""

    def __post_init__(self) -> None:
        expression = self.form == "expression"
        if not isinstance(self.text, (str, re.Pattern) if expression else str) or (expression and self.text == ""):
            expected = "a string with name components or a regular expression" if expression else "a string"
            raise TypeError(
                f"{self.subject}: got {self.text!r} of type {type(self.text).__name__}, expected {expected}"
            )

    def __str__(self) -> str:
        return f"{self.subject} {self._text!r}"

    def matches(self, name: str) -> bool:
        """Whether the pattern means the parameter, or the module, of this name."""
        name = plain_name(name)
        if self.form == "part":
            begin, end = (r"(?<!\d)" * self._text[:1].isdigit(), r"(?!\d)" * self._text[-1:].isdigit())
            return re.search(begin + re.escape(self._text) + end, name) is not None
        if self.form == "expression" and (isinstance(self.text, re.Pattern) or not _COMPONENTS.fullmatch(self.text)):
            return any(re.fullmatch(self.text, each) for each in (name, name.rpartition(".")[0]))
        stem = plain_name(self._text.strip("."))
        return f"{name}.".startswith(f"{stem}.") if self.form == "start" else f".{stem}." in f".{name}."

    def select(self, names: Iterable[str]) -> list[str]:
        """The names that the pattern matches.

        Raises:
            ValueError: there are none.
        """
        names = list(names)
        found = [name for name in names if self.matches(name)]
        if not found:
            raise ValueError(
                f"{self} matches no parameter; closest names are {', '.join(self.closest(names))}. {_RULES[self.form]}"
            )
        return found

    def closest(self, names: Iterable[str]) -> list[str]:
        """The components of names that are most like the pattern, at most three."""
        text, runs = plain_name(self._text.strip(".")), dict[str, None]()
        for components in (plain_name(name).split(".") for name in names):
            for first in range(1 if self.form == "start" else len(components)):
                # From the start a longer or a shorter prefix may be meant; elsewhere as many components.
                num = range(1, len(components) + 1) if self.form == "start" else (text.count(".") + 1,)
                runs.update((".".join(components[first : first + each]), None) for each in num)
        return difflib.get_close_matches(text, runs, n=3, cutoff=0.0)

    @property
    def _text(self) -> str:
        return self.text if isinstance(self.text, str) else self.text.pattern


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
