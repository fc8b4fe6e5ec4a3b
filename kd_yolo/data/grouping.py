"""Find the images that must not be separated: same bytes, same part by name, or same look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd_yolo.data.pixels import ImageFacts, examine, in_threads, similar_pairs
from kd_yolo.errors import ConfigError

SIMILAR_GROUP = "similar"


@dataclass(frozen=True)
class Item:
    """One image to be placed: unique key, file stem, classes it holds, content hash, published split, image file."""

    key: str
    stem: str
    labels: frozenset[str]
    digest: str
    published: str | None = None
    path: Path | None = None


def group_items(items: Sequence[Item], group: str | None) -> list[int]:
    """Return a group number for each item; items that share content or a group share the number.

    Args:
        items: The images.
        group: A regular expression, ``similar`` or None; see ``SplitSpec.group``.

    Raises:
        ConfigError: ``group`` is not a regular expression.
    """
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, item in enumerate(items):
        parent[root(i)] = root(first.setdefault(("bytes", item.digest), i))
    for i, j in _alike(items) if group == SIMILAR_GROUP else _matching(items, group):
        parent[root(i)] = root(j)
    return [root(i) for i in range(len(items))]


def _matching(items: Sequence[Item], pattern: str | None) -> list[tuple[int, int]]:
    """Return pairs of items whose stems give the same match."""
    if not pattern:
        return []
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"group={pattern}: not a regular expression ({error})") from error
    first: dict[str, int] = {}
    pairs = []
    for i, item in enumerate(items):
        match = expression.search(item.stem)
        if match:
            mark = next((part for part in match.groups() if part is not None), match.group())
            pairs.append((i, first.setdefault(mark, i)))
    return pairs


def _alike(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Return pairs of items that look alike."""
    rows = [i for i, item in enumerate(items) if item.path is not None]
    looks = {i: facts.look for i, facts in _examined(items, rows)}
    known = [i for i in rows if i in looks]
    if not known:
        return []
    return [(known[a], known[b]) for a, b, _ in similar_pairs(np.stack([looks[i] for i in known]))]


def _examined(items: Sequence[Item], rows: list[int]) -> list[tuple[int, ImageFacts]]:
    """Decode the images; those that cannot be decoded are no one's look-alike."""
    results = in_threads(examine, [path for i in rows if (path := items[i].path) is not None])
    return [(i, facts) for i, (_, facts) in zip(rows, results, strict=True) if isinstance(facts, ImageFacts)]
