"""Split images into train, val and test: from lists, k-fold or stratified at random, without leaks.

Byte-identical images always stay together, and so do images of one ``group`` (a regular expression on the file stem,
for parts that were photographed several times). Stratification is by the classes an image holds, several at once
(K. Sechidis, G. Tsoumakas, I. Vlahavas, "On the stratification of multi-label data", ECML PKDD 2011, algorithm 1), here
over groups, and with parts that close when they are full.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from kd_yolo.data.grouping import Item, group_items
from kd_yolo.data.layout import SPLITS
from kd_yolo.data.samples import SPLIT_WORDS
from kd_yolo.errors import ConfigError, DataError

Method = Literal["auto", "published", "lists", "random", "kfold"]

BACKGROUND = "(background)"


@dataclass(frozen=True)
class SplitSpec:
    """How to split.

    Attributes:
        method: ``auto`` takes lists if there are any, else the published split, else a random one.
        ratios: Shares of train, val and test of a random split; they sum to 1.
        folds: Number of folds.
        fold: Which fold is the test part, 0 to folds - 1.
        val_share: Part of the remaining images that becomes val in a fold, and when a published split has no val.
        seed: Seed of every random choice.
        lists: Folder with train.txt, val.txt and test.txt: a file stem a line.
        group: Regular expression; images whose stems give the same first group (else whole match) stay together. Or
            ``similar``: images that look alike stay together, for parts photographed several times under any name.
        fixed: Stems of some splits, written compactly (see ``expand_stems``); all others are train. Used by ``auto``
            when every one of them is there.
    """

    method: Method = "auto"
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    folds: int = 5
    fold: int = 0
    val_share: float = 0.1
    seed: int = 0
    lists: Path | None = None
    group: str | None = None
    fixed: dict[str, str] | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: The line names the number and its range.
        """
        if any(share < 0 for share in self.ratios) or abs(sum(self.ratios) - 1) > 1e-6 or not all(self.ratios[:2]):
            raise ConfigError(f"split ratios {self.ratios}: train and val must be above 0 and all must sum to 1")
        if self.folds < 2 or not 0 <= self.fold < self.folds:
            raise ConfigError(f"fold {self.fold} of {self.folds}: need at least 2 folds and a fold of 0 to folds - 1")
        if not 0 < self.val_share < 1:
            raise ConfigError(f"val_share={self.val_share}: must lie between 0 and 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be 0 or more")


@dataclass
class Assignment:
    """Where every image goes; images that no list names are in ``left_out``."""

    split: dict[str, str]
    decisions: list[str]
    left_out: list[str]


def parse_split(text: str, seed: int = 0, group: str | None = None) -> SplitSpec:
    """Read a split as the command line gives it.

    Args:
        text: ``auto``, ``published``, ratios such as ``0.8/0.1/0.1`` or ``8:1:1``, ``kfold:5:0`` (folds, fold) or a
            folder of lists.
        seed: Seed of every random choice.
        group: Regular expression of images that stay together.

    Raises:
        ConfigError: None of these.
    """
    base = SplitSpec(seed=seed, group=group)
    words: dict[str, Method] = {"auto": "auto", "published": "published", "random": "random"}
    if text in words:
        return replace(base, method=words[text])
    numbers = re.split(r"[/:,]", text)
    if numbers[0] == "kfold" and len(numbers) in {2, 3} and all(n.isdigit() for n in numbers[1:]):
        return replace(base, method="kfold", folds=int(numbers[1]), fold=int(numbers[2]) if len(numbers) == 3 else 0)
    if len(numbers) == 3 and all(re.fullmatch(r"\d*\.?\d+", n) for n in numbers):
        shares = [float(n) for n in numbers]
        total = sum(shares) or 1.0
        return replace(base, method="random", ratios=(shares[0] / total, shares[1] / total, shares[2] / total))
    if text and Path(text).is_dir():
        return replace(base, method="lists", lists=Path(text))
    raise ConfigError(
        f"split={text}: not understood; use auto, published, 0.8/0.1/0.1, kfold:5:0 "
        "or a folder that holds train.txt and val.txt"
    )


def assign(items: Sequence[Item], spec: SplitSpec) -> Assignment:
    """Decide the split of every image.

    Raises:
        DataError: A list names an image that is not there or twice, or a split would be empty.
        ConfigError: The group expression is not valid.
    """
    if not items:
        raise DataError("there is no usable image to split")
    groups = group_items(items, spec.group)
    result = _choose(items, groups, spec)
    for split in ("train", "val"):
        if split not in result.split.values():
            raise DataError(f"the '{split}' part would be empty ({len(items)} images); use other ratios or more images")
    _note_leaks(items, result)
    return result


def stratify(labels: Sequence[frozenset[str]], groups: Sequence[int], shares: Sequence[float], seed: int) -> list[int]:
    """Place whole groups so that every class is shared out as wished.

    Args:
        labels: Classes of each item.
        groups: Group number of each item.
        shares: Wished share of each part; they sum to 1.
        seed: Seed of the order within equals.

    Returns:
        The part of each item, an index into ``shares``.
    """
    rng = np.random.default_rng(seed)
    content: dict[int, Counter[str]] = defaultdict(Counter)
    for item_labels, group in zip(labels, groups, strict=True):
        content[group].update(item_labels or {BACKGROUND})
        content[group][""] += 1  # the number of images, kept beside the classes
    order = [list(content)[i] for i in rng.permutation(len(content))]
    order.sort(key=lambda group: -content[group][""])  # big groups first: small ones fill the gaps
    left: Counter[str] = sum(content.values(), Counter())
    wish = {label: np.array(shares) * count for label, count in left.items()}
    placed: dict[int, int] = {}
    while len(placed) < len(content):
        rest = [label for label in left if label and left[label] > 0]
        rarest = min(rest, key=lambda label: (left[label], label))
        for group in [g for g in order if g not in placed and content[g][rarest]]:
            # a part that has its number of images takes no more: many rare classes would otherwise all go to train
            open_parts = (np.array(shares) > 0) & (wish[""] >= content[group][""] / 2)
            if not open_parts.any():
                open_parts = np.array(shares) > 0
            rank = np.where(open_parts, wish[rarest], -np.inf), np.where(open_parts, wish[""], -np.inf)
            part = int(np.lexsort((rng.random(len(shares)), rank[1], rank[0]))[-1])
            placed[group] = part
            for label, count in content[group].items():
                wish[label][part] -= count
                left[label] -= count
    return [placed[group] for group in groups]


def read_lists(folder: Path) -> dict[str, list[str]]:
    """Read train.txt, val.txt and test.txt (or valid.txt, validation.txt ...): a stem, file name or path a line.

    Raises:
        DataError: There is no train or no val list.
    """
    lists: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.txt")):
        split = SPLIT_WORDS.get(file.stem.lower())
        if split and file.stem.lower() != "trainval":
            lines = (line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines())
            lists[split] = [re.sub(r"\.(jpe?g|png|bmp|tiff?|xml|txt)$", "", Path(line).name) for line in lines if line]
    if "train" not in lists or "val" not in lists:
        raise DataError(f"{folder}: train.txt and val.txt are needed; found {', '.join(sorted(lists)) or 'neither'}")
    return lists


def expand_stems(text: str) -> list[str]:
    """Expand ``crack_{1,4} spot_7`` to ``crack_1 crack_4 spot_7``."""
    stems: list[str] = []
    for token in re.findall(r"[^\s{]*\{[^}]*\}|\S+", text):
        head, brace, tail = token.partition("{")
        stems += [head + part.strip() for part in tail.rstrip("}").split(",")] if brace else [head]
    return stems


def _choose(items: Sequence[Item], groups: list[int], spec: SplitSpec) -> Assignment:
    if spec.method == "lists" or (spec.method == "auto" and spec.lists is not None):
        if spec.lists is None:
            raise ConfigError("split by lists needs the folder that holds train.txt, val.txt and test.txt")
        return _by_lists(items, read_lists(spec.lists), f"lists in {spec.lists}")
    if spec.method == "auto" and spec.fixed:
        fixed = {split: expand_stems(text) for split, text in spec.fixed.items()}
        chosen = {stem for stems in fixed.values() for stem in stems}
        if chosen <= {item.stem for item in items}:
            fixed["train"] = [item.stem for item in items if item.stem not in chosen]
            return _by_lists(items, fixed, "the fixed split that comes with this data set")
    published = {item.published for item in items} - {None}
    if spec.method == "published" or (spec.method == "auto" and len(published) > 1):
        return _published(items, groups, spec)
    labels = [item.labels for item in items]
    if spec.method == "kfold":
        return _fold(items, groups, spec)
    parts = stratify(labels, groups, spec.ratios, spec.seed)
    shown = "/".join(f"{share:g}" for share in spec.ratios)
    decision = f"stratified random split {shown}, seed {spec.seed}" + (f", groups {spec.group}" if spec.group else "")
    return Assignment({item.key: SPLITS[part] for item, part in zip(items, parts, strict=True)}, [decision], [])


def _by_lists(items: Sequence[Item], lists: dict[str, list[str]], source: str) -> Assignment:
    place: dict[str, str] = {}
    for split, stems in lists.items():
        for stem in stems:
            if place.setdefault(stem, split) != split:
                raise DataError(f"{source}: '{stem}' is in {place[stem]} and in {split}; keep it in one")
    known = {item.stem for item in items} | {item.key for item in items}
    unknown = [stem for stem in place if stem not in known]
    if unknown:
        raise DataError(f"{source}: '{unknown[0]}' has no usable image ({len(unknown)} such lines of {len(place)})")
    split_of = {item.key: place.get(item.key) or place.get(item.stem) for item in items}
    left_out = [key for key, split in split_of.items() if split is None]
    return Assignment({key: split for key, split in split_of.items() if split}, [f"split by {source}"], left_out)


def _published(items: Sequence[Item], groups: list[int], spec: SplitSpec) -> Assignment:
    split = {item.key: item.published for item in items if item.published}
    left_out = [item.key for item in items if not item.published]
    decisions = ["split as published"]
    if "val" not in split.values():
        rows = [i for i, item in enumerate(items) if item.published == "train"]
        shares = (1 - spec.val_share, spec.val_share)
        parts = stratify([items[i].labels for i in rows], [groups[i] for i in rows], shares, spec.seed)
        split.update({items[i].key: "val" for i, part in zip(rows, parts, strict=True) if part})
        decisions.append(f"no val published: {spec.val_share:g} of train set aside, stratified, seed {spec.seed}")
    return Assignment(split, decisions, left_out)


def _fold(items: Sequence[Item], groups: list[int], spec: SplitSpec) -> Assignment:
    parts = stratify([item.labels for item in items], groups, [1 / spec.folds] * spec.folds, spec.seed)
    split = {item.key: "test" for item, part in zip(items, parts, strict=True) if part == spec.fold}
    rows = [i for i, part in enumerate(parts) if part != spec.fold]
    shares = (1 - spec.val_share, spec.val_share)
    inner = stratify([items[i].labels for i in rows], [groups[i] for i in rows], shares, spec.seed)
    split.update({items[i].key: SPLITS[part] for i, part in zip(rows, inner, strict=True)})
    decision = f"fold {spec.fold} of {spec.folds} is test, {spec.val_share:g} of the rest is val, seed {spec.seed}"
    return Assignment(split, [decision], [])


def _note_leaks(items: Sequence[Item], result: Assignment) -> None:
    """Say when given lists separate byte-identical images (they are left as given)."""
    seen: dict[str, set[str]] = defaultdict(set)
    for item in items:
        if item.key in result.split:
            seen[item.digest].add(result.split[item.key])
    leaks = sum(len(splits) > 1 for splits in seen.values())
    if leaks:
        result.decisions.append(
            f"WARNING: {leaks} images are in two splits byte for byte; kd-yolo data check lists them"
        )
