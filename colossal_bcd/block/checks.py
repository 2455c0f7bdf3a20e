"""Checks of arguments that several files of this folder share."""

from __future__ import annotations

from typing import Any


def require_int(name: str, value: Any, minimum: int) -> None:
    """Refuse what is not an int (a bool is not one here) or is too small.

    Raises:
        TypeError: `value` is not an int.
        ValueError: `value` is less than `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected an int")
    if value < minimum:
        raise ValueError(f"{name}: got {value}, expected an int of at least {minimum}")


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse what is not one of the choices.

    Raises:
        ValueError: `value` is none of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
