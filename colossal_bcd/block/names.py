"""Names of parameters without what wrappers of modules put into them."""

from __future__ import annotations

WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))
"""Name components of torch.compile and of torch's checkpoint wrapper, which may come and go between two runs."""


def plain_name(name: str) -> str:
    """The name that a parameter has where nothing is wrapped: "model.norm.weight" of "_orig_mod.model.norm.weight"."""
    return ".".join(component for component in name.split(".") if component not in WRAPPERS)
