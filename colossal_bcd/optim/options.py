"""Hyper-parameters: values that are checked where they are made, and the flat keys under which groups have them.

An optimizer's hyper-parameters are the fields of one frozen dataclass.  A param group is a plain dict whose keys are
the fields' names, or the names that an original has for them; constructors take the same keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
Bits = Literal[32, 8]
TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of parameters that can be trained."""


OPTIONAL = {"optional": True}
"""Metadata of a field that groups have only where it differs from its default, so that groups and checkpoints of
everybody else stay those of the originals.  `{"key": name}` is that of one which groups have under another name."""


@dataclass(frozen=True)
class Key:
    """A hyper-parameter as param groups have it."""

    name: str
    field: str
    optional: bool
    default: Any


@functools.cache
def keys_of(hyper_type: Any) -> tuple[Key, ...]:
    """The keys of a dataclass of hyper-parameters, in the order of its positional arguments."""
    fields = sorted(dataclasses.fields(hyper_type), key=lambda each: bool(each.kw_only))
    return tuple(
        Key(each.metadata.get("key", each.name), each.name, "optional" in each.metadata, each.default)
        for each in fields
    )


@dataclass(frozen=True)
class Hyper:
    """Base of hyper-parameters; classes that derive from several call each `__post_init__` once."""

    def __post_init__(self) -> None:
        """Check the values."""


@dataclass(frozen=True, kw_only=True)
class RoundingOptions(Hyper):
    """How low-precision weights are rounded."""

    rounding: Rounding = field(default="nearest", metadata=OPTIONAL)
    """How updated bfloat16 and float16 parameters are rounded: "nearest" by the dtype's own arithmetic, which loses
    updates below half its step; "stochastic" from a float32 copy, unbiased (arXiv 1502.02551, section 3).  Parameters
    of other dtypes, float32 masters among them, are not rounded at all."""
    seed: int = field(default=0, metadata=OPTIONAL)
    """Seed of what is random: stochastic rounding, with the parameter's number, the number of the step and the value's
    index; random projectors, with the parameter's number and the number of the refresh."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounding in ("nearest", "stochastic"), "rounding", self.rounding, '"nearest" or "stochastic"')
        require(isinstance(self.seed, int) and not isinstance(self.seed, bool), "seed", self.seed, "an integer")


@dataclass(frozen=True, kw_only=True)
class Storage(RoundingOptions):
    """How weights and the first moment are stored: `AdamW(params, storage=Storage(rounding="stochastic"))`."""

    moment_bits: Bits = field(default=32, metadata=OPTIONAL)
    """Bits of a value of the first moment between steps: 32, or 8 by bitsandbytes' blockwise quantisation with its
    signed dynamic map (arXiv 2110.02861, sections 2.1 and 2.2), whose error is at most 0.71 % of the largest magnitude
    among 256 neighbours.  The second moment stays as it is: it divides, so errors of small values would matter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not isinstance(self.moment_bits, bool) and self.moment_bits in (32, 8),
            "moment_bits",
            self.moment_bits,
            "32 or 8",
        )


def flat_options(owner: str, argument: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flat keys of a value such as `Storage`, of its fields that differ from their defaults; each is given once."""
    if value is None:
        return {}
    kind: Any = type(value)
    keys = keys_of(kind)
    twice = sorted({key.name for key in keys} & given.keys())
    if twice:
        raise TypeError(
            f"{owner}: got {argument}= and {', '.join(twice)} beside it, expected either. Put it into the value."
        )
    return {key.name: getattr(value, key.field) for key in keys if getattr(value, key.field) != key.default}


def make_hyper(owner: str, hyper_type: Any, values: Sequence[Any], flat: Mapping[str, Any]) -> Any:
    """Hyper-parameters, a dataclass, from a constructor's positional and keyword arguments.

    Raises:
        TypeError: an argument is no hyper-parameter.
        ValueError: one is out of range.
    """
    fields = {key.name: key.field for key in keys_of(hyper_type)}
    for name in flat:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            meant = f"; did you mean {meant_key(name, list(fields)) or close[0]!r}?" if fields else "."
            raise TypeError(
                f"{owner} got an unexpected keyword argument {name!r}{meant} Its hyper-parameters are "
                f"{', '.join(fields)}."
            )
    return hyper_type(*values, **{fields[name]: value for name, value in flat.items()})


def signature_of(cls: type[Any], fixed: Iterable[str] = ()) -> inspect.Signature:
    """The signature of an optimizer's constructor, with its hyper-parameters in place of `*values` and `**flat`.

    Hyper-parameters that are `fixed` by the class are left out.
    """
    own = [parameter for name, parameter in inspect.signature(cls.__init__).parameters.items() if name != "self"]
    if not own or own[-1].kind != inspect.Parameter.VAR_KEYWORD:
        return inspect.Signature(own)
    names = {parameter.name for parameter in own} | set(fixed)
    constructor = list(inspect.signature(cls.hyper_type).parameters.values())
    flat = [
        parameter.replace(name=key.name)
        for key, parameter in zip(keys_of(cls.hyper_type), constructor, strict=True)
        if key.name not in names
    ]
    kept = [p for p in own if p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)]
    return inspect.Signature(sorted([*kept, *flat], key=lambda parameter: parameter.kind))


def plain_number(value: Any) -> Any:
    """A hyper-parameter as rules read it: the value of a tensor of one value, such as a learning rate, and of a tuple.

    A tensor on an accelerator is waited for.
    """
    if isinstance(value, tuple):
        return tuple(map(plain_number, value))
    return value.item() if isinstance(value, Tensor) else value


def require(condition: bool, name: str, got: Any, expected: str) -> None:
    """Refuse a hyper-parameter.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(f"hyper-parameter {name}: got {got!r}, expected {expected}")


def require_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Refuse what no member of Adam's family can use."""
    require(lr >= 0, "lr", lr, "a non-negative number")
    require_betas(betas)
    require(eps >= 0, "eps", eps, "a non-negative number")
    require(weight_decay >= 0, "weight_decay", weight_decay, "a non-negative number")


def require_betas(betas: tuple[float, float]) -> None:
    """Refuse what are no two decays."""
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers in [0, 1)")


def require_real(owner: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that require a gradient and are complex, or of 8-bit floats.

    Frozen ones, such as packed 4-bit weights, may be of any dtype.
    """
    for name, param in named:
        if param.requires_grad and param.dtype not in TRAINABLE:
            complex_only = "Hold it as a real tensor (torch.view_as_real), which is what Adam does with it. "
            raise ValueError(
                f"{owner}: parameter {name} of shape {tuple(param.shape)} is {param.dtype}, expected float16, "
                f"bfloat16, float32 or float64. {complex_only if param.is_complex() else ''}Or freeze it."
            )


def members_with_names(param_group: Mapping[str, Any], first: int) -> list[tuple[str, Tensor]]:
    """The parameters of a group with their names, where the group has `param_names`, or their numbers from `first`."""
    params, names = list(param_group["params"]), list(param_group.get("param_names", ()))
    if len(names) != len(params):
        names = [f"number {first + index}" for index in range(len(params))]
    return list(zip(names, params, strict=True))


def require_keys(owner: str, param_group: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that look like a hyper-parameter and are none; others belong to the user and are kept."""
    for key in param_group:
        meant = None if key in known else meant_key(key, known)
        if meant is not None:
            raise ValueError(
                f"{owner} param group has {key!r}, which is no hyper-parameter; did you mean {meant!r}? The "
                f"hyper-parameters are {', '.join(known)}."
            )


def meant_key(key: str, known: Sequence[str]) -> str | None:
    """The hyper-parameter for which a key was probably meant, if any.

    Nearly the same letters, the same ones in another order ("rnak"), the beginning of the name in up to three letters
    ("r", the shortest name wins), or the initials of the one in place of the other ("wd", "learning_rate").
    """
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if close:
        return close[0]
    swapped = [name for name in known if sorted(name) == sorted(key)]
    begun = sorted((name for name in known if len(key) <= 3 and name.startswith(key)), key=len)
    short = [name for name in known if _initials(name) == key or _initials(key) == name]
    return next(iter([*swapped, *begun, *short]), None)


def _initials(name: str) -> str:
    """First letters of a name of several words."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
