"""One language of patterns for names of parameters, and its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from colossal_bcd.names import Pattern

NAMES = [f"model.layers.{layer}.self_attn.{part}" for layer in (1, 10, 21) for part in ("q_proj.weight", "bias")]


def test_code_of_the_page_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "names.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})


@pytest.mark.parametrize(
    ("text", "form", "layers"),
    [
        ("model.layers.1", "start", [1]),
        ("_orig_mod.model.layers.1.", "start", [1]),
        ("layers.1", "start", []),
        (".layers.1.", "anywhere", [1]),
        ("attn", "anywhere", []),
        ("layers.1", "expression", [1]),
        (r"model.layers.\d.self_attn", "expression", [1]),
        (r"layers.\d.self_attn", "expression", []),
        (r"model.layers.\d\d.self_attn(.q_proj)?", "expression", [10, 21]),
        ("layers.1", "part", [1]),
        ("ers.1", "part", [1]),
        ("1", "part", [1]),
        (".self_a", "part", [1, 10, 21]),
        *(("", form, []) for form in ("start", "anywhere")),
        *((".", form, []) for form in ("start", "anywhere", "expression")),
        *(("_orig_mod", form, []) for form in ("start", "anywhere", "part")),
    ],
)
def test_pattern_matches_in_wrapped_models_as_in_others(text: str, form: Any, layers: list[int]) -> None:
    pattern = Pattern(text, form)
    for names in (NAMES, [f"_orig_mod.{name}" for name in NAMES]):
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in names if pattern.matches(name)} == set(layers)


@pytest.mark.parametrize("form", ["start", "anywhere", "expression", "part"])
def test_pattern_that_matches_nothing_says_what_is_closest(form: Any) -> None:
    with pytest.raises(ValueError, match=r"^option 'model\.layer\.1' matches no parameter; closest names are model\.l"):
        Pattern("model.layer.1", form, "option").select(NAMES)


@pytest.mark.parametrize(
    ("text", "form"),
    [(3, "start"), (None, "part"), (re.compile("a"), "anywhere"), (b"a", "expression"), ("", "expression")],
)
def test_pattern_of_another_type_is_refused(text: Any, form: Any) -> None:
    with pytest.raises(TypeError, match=r"option: got .* of type .*, expected a string"):
        Pattern(text, form, "option")
