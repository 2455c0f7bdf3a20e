"""Fences of the language `math` become MathML when the site is built, so that no script has to draw them."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def equation(source: str, *_: Any, **__: Any) -> str:
    """A block of MathML from the LaTeX between the fences, one line of it for each line of the source.

    Args:
        source: LaTeX; each line that is not empty is an equation of its own.
    """
    lines = (convert(line, display="block") for line in source.splitlines() if line.strip())
    # Without a font for mathematics a plain circumflex would lie on the letter that it belongs to.
    return f'<div class="equations">{"".join(lines)}</div>'.replace("&#x0005E;", "&#x002C6;")


def on_config(config: Any) -> Any:
    """Give the fence to the extension, which takes functions and not their names."""
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "math", "format": equation}]
    }
    return config
