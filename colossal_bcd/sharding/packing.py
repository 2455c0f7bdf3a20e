"""Which items travel together, and which rank does what: pure functions of sizes, the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def pack(
    items: Iterable[T], size: Callable[[T], float], limit: float, kind: Callable[[T], Any] = lambda _: None
) -> Iterator[list[T]]:
    """Fill buckets with neighbours.

    Args:
        items: consumed lazily, one ahead of the bucket that is returned.
        size: of an item.
        limit: largest sum of sizes in a bucket; a larger item is a bucket of its own.
        kind: neighbours of different kinds share no bucket.
    Returns:
        Iterator over buckets, none of them empty, in the order of the items.
    """
    bucket: list[T] = []
    filled = 0.0
    for item in items:
        if bucket and (filled + size(item) > limit or kind(item) != kind(bucket[0])):
            yield bucket
            bucket, filled = [], 0.0
        bucket.append(item)
        filled += size(item)
    if bucket:
        yield bucket


def least_loaded(
    costs: Mapping[int, int],
    num_bins: int | Callable[[int], int],
    group: Callable[[int], Hashable] = lambda _: None,
) -> dict[int, int]:
    """Spread items over bins: the costliest first, each to the bin with least to do.

    Args:
        costs: by key.
        num_bins: how many there are, or by key, where an item goes into one of the first so many bins.
        group: by key; items of other groups count only where bins have equally much to do in the item's own.
    Returns:
        Bin by key.
    """
    found: dict[int, int] = {}
    in_group: Counter[tuple[Hashable, int]] = Counter()
    in_all: Counter[int] = Counter()
    for key in sorted(costs, key=lambda key: (-costs[key], key)):
        own, count = group(key), num_bins(key) if callable(num_bins) else num_bins
        chosen = min(range(count), key=lambda index: (in_group[own, index], in_all[index], index))
        in_group[own, chosen] += costs[key]
        in_all[chosen] += costs[key]
        found[key] = chosen
    return found
