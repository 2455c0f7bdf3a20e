"""Blocks from parameter names: one per layer, or as the user lists them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from colossal_bcd.block.checks import require_int
from colossal_bcd.names import Pattern, plain_name, role_of

PrefixList: TypeAlias = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class Block:
    """Parameters that are trained together."""

    name: str
    """For people: what the block was made from."""
    parameters: tuple[str, ...]
    """Canonical names, in model order."""


def partition(
    names: Iterable[str],
    *,
    aliases: Mapping[str, str] | None = None,
    trainable: Collection[str] | None = None,
    block_prefix_list: PrefixList | None = None,
    include_embedding: bool = False,
    include_lm_head: bool = False,
    num_layers_per_block: int = 1,
    merge_seed: int | None = None,
) -> tuple[Block, ...]:
    """Divide parameters into blocks; what is in no block is not trained.

    By default there is one block per layer.  The embeddings make a first block if asked for, the head a last one; the
    final norm and everything else are in no block.  A head tied to the embedding is one tensor and is in one block: the
    embedding's with `include_embedding`, else the head's with `include_lm_head`; it is never trained unasked.

    Args:
        names: canonical names of all parameters, in model order.
        aliases: further name of a tied parameter -> canonical name.
        trainable: canonical names that blocks may train; None: all.  Default blocks without any are left out.
        block_prefix_list: the blocks, each a list of prefixes (or one prefix).  A prefix is whole components from the
            start of a name, with or without a '.' at its end.
        include_embedding: also make a block of the embeddings; default blocks only.
        include_lm_head: also make a block of the head; default blocks only.
        num_layers_per_block: layers in a block, the last one may have fewer; default blocks only.
        merge_seed: draw the layers of a block instead of taking neighbours.
    Raises:
        TypeError: a prefix is not a string, or a list is a string.
        ValueError: there is nothing to train in what was asked for, a prefix matches nothing, blocks overlap, or an
            option for default blocks comes with a `block_prefix_list`.
    """
    names, aliases = tuple(names), aliases or {}
    trainable = frozenset(names if trainable is None else trainable)
    require_int("n_layer_per_block", num_layers_per_block, 1)
    if block_prefix_list is not None:
        if include_embedding or include_lm_head or num_layers_per_block > 1:
            raise ValueError(
                f"block_prefix_list: got it with include_embedding={include_embedding}, "
                f"include_lm_head={include_lm_head}, n_layer_per_block={num_layers_per_block}, which are for default "
                "blocks; expected one or the other. Put the prefixes of embedding and head into block_prefix_list."
            )
        return _listed(names, aliases, trainable, block_prefix_list)
    layers, embedding, head = _by_role(names, aliases, include_embedding, include_lm_head)
    if include_embedding:
        _require_trainable("include_embedding", "an embedding", embedding, trainable)
    if include_lm_head:
        # A tied head that is in the embedding's block is trained as asked, with no block of its own.
        tied = _names_like("head", names, aliases).intersection(embedding)
        _require_trainable("include_lm_head", "a head", [*head, *tied], trainable)
    if not layers:
        raise ValueError(
            f"named_parameters_list: none of the {len(names)} names shows a layer (a number between dots, as in "
            f"'model.layers.0.mlp.weight'); got {', '.join(names[:3])}... Say what the blocks are with "
            "block_prefix_list."
        )
    blocks = [Block(name, tuple(parameters)) for name, parameters in layers.items()]
    blocks = [block for block in (_only(block, trainable) for block in blocks) if block.parameters]
    if not blocks:
        raise ValueError(
            f"named_parameters_list: every parameter of the {len(layers)} layers is frozen, expected a trainable one. "
            "Unfreeze some before, or say what the blocks are with block_prefix_list."
        )
    blocks = _merged(blocks, names, num_layers_per_block, merge_seed)
    ends = _only(Block("embedding", tuple(embedding)), trainable), _only(Block("head", tuple(head)), trainable)
    return tuple(block for block in (ends[0], *blocks, ends[1]) if block.parameters)


def match(prefix: str, names: Sequence[str], aliases: Mapping[str, str], subject: str) -> set[str]:
    """Canonical names of the parameters under a prefix (see `Pattern`), which has to match; `subject` is what it is."""
    everything = {**{name: name for name in names}, **aliases}
    return {everything[name] for name in Pattern(prefix, "start", subject).select(everything)}


def _listed(
    names: Sequence[str], aliases: Mapping[str, str], trainable: Collection[str], block_prefix_list: PrefixList
) -> tuple[Block, ...]:
    if isinstance(block_prefix_list, str) or not isinstance(block_prefix_list, Sequence):
        raise TypeError(
            f"block_prefix_list: got {block_prefix_list!r}, expected a list of blocks, each a list of prefixes, such "
            "as [['model.layers.0.'], ['model.layers.1.']]"
        )
    if not block_prefix_list:
        raise ValueError(
            "block_prefix_list: got an empty list, expected at least one block. Use None for default blocks."
        )
    blocks, owner = [], dict[str, int]()
    for index, entry in enumerate(block_prefix_list):
        prefixes = [entry] if isinstance(entry, str) else entry
        if not isinstance(prefixes, Sequence):
            raise TypeError(f"block_prefix_list[{index}]: got {entry!r}, expected a list of prefixes")
        if not prefixes:
            raise ValueError(f"block_prefix_list[{index}]: got an empty list, expected at least one prefix")
        found = set().union(*(match(prefix, names, aliases, "block prefix") for prefix in prefixes))
        for name in names:
            if name in found and owner.setdefault(name, index) != index:
                raise ValueError(
                    f"block_prefix_list: parameter {name!r} is in block {owner[name]} "
                    f"({block_prefix_list[owner[name]]}) and in block {index} ({entry}), expected it in one. Tied "
                    "parameters are one parameter."
                )
        label = "+".join(plain_name(prefix.removesuffix(".")) for prefix in prefixes)
        block = _only(Block(label, _ordered(found, names)), trainable)
        if not block.parameters:
            raise ValueError(
                f"block_prefix_list[{index}]: {entry} matches {len(found)} parameters, none of which may be trained "
                "(frozen before, or not an adapter in a model with LoRA adapters). Unfreeze them or leave the block "
                "out."
            )
        blocks.append(block)
    return tuple(blocks)


def _by_role(
    names: Sequence[str], aliases: Mapping[str, str], include_embedding: bool, include_lm_head: bool
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Parameters of each layer, of the embedding and of the head, the latter two empty unless included."""
    layers: dict[str, list[str]] = {}
    embedding, head = [], []
    embeddings, heads = (_names_like(kind, names, aliases) for kind in ("embedding", "head"))
    for name in names:
        where = role_of(name)
        if name in embeddings and include_embedding:
            embedding.append(name)
        elif name in heads and include_lm_head:
            head.append(name)
        elif where.layer is not None and name not in embeddings and name not in heads:
            layers.setdefault(where.layer, []).append(name)
    return layers, embedding, head


def _names_like(kind: str, names: Sequence[str], aliases: Mapping[str, str]) -> set[str]:
    """Canonical names of the parameters one of whose names is of that kind."""
    return {aliases.get(name, name) for name in itertools.chain(names, aliases) if role_of(name).kind == kind}


def _require_trainable(option: str, what: str, found: Collection[str], trainable: Collection[str]) -> None:
    if not found:
        raise ValueError(
            f"{option}: got True, but no parameter name looks like that of {what}. Any name can be given in "
            "block_prefix_list. A head tied to the embedding has a name of its own only in "
            "model.named_parameters(remove_duplicate=False); include_embedding=True trains it as well."
        )
    if not any(name in trainable for name in found):
        raise ValueError(
            f"{option}: got True, but {', '.join(found)} may not be trained (frozen before, or not an adapter in a "
            f"model with LoRA adapters). Unfreeze them or use {option}=False."
        )


def _merged(blocks: list[Block], names: Sequence[str], size: int, seed: int | None) -> list[Block]:
    """Blocks of `size` layers; each keeps model order, and the blocks stay in the order of their first layers."""
    if size == 1:
        return blocks
    indices = list(range(len(blocks)))
    if seed is not None:
        random.Random(f"layers of a block, seed {seed}").shuffle(indices)
    chunks = sorted(sorted(indices[start : start + size]) for start in range(0, len(indices), size))
    merged = []
    for chunk in chunks:
        parameters = {name for index in chunk for name in blocks[index].parameters}
        merged.append(Block("+".join(blocks[index].name for index in chunk), _ordered(parameters, names)))
    return merged


def _ordered(found: Collection[str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in found)


def _only(block: Block, trainable: Collection[str]) -> Block:
    return Block(block.name, _ordered(trainable, block.parameters))
