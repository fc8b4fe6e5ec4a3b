"""Find recordings in class folders and share them out by part, so that no part is seen in training and tested too."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kd_yolo.data.grouping import SIMILAR_GROUP, Item, group_items
from kd_yolo.data.layout import SPLITS, files_under
from kd_yolo.data.samples import SPLIT_WORDS
from kd_yolo.data.signals_read import SIGNAL_SUFFIXES
from kd_yolo.data.splits import Assignment, SplitSpec, assign, stratify
from kd_yolo.errors import ConfigError, DataError

FOLDER_OR_FILE = r"^(.+)/|^.*$"
"""What is one part unless the user says otherwise: a sub-folder of a class, else a file.

Equal names below two classes are one part: most likely one that was recorded sound and cracked."""
WHOLE = r"^.*$"


@dataclass(frozen=True)
class Source:
    """One file: its class, its path below the class folder without suffix, and the published split, if any."""

    file: Path
    label: str
    stem: str
    published: str | None = None


@dataclass
class Found:
    """What lies in a folder."""

    sources: list[Source] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)


def find_sources(src: Path) -> Found:
    """List the recordings in ``src/CLASS/...`` or ``src/train|val|test/CLASS/...``.

    Raises:
        DataError: No class folders, fewer than two classes, or split folders beside class folders.
    """
    found = Found()
    loose = []
    tops = {path.relative_to(src).parts[0] for path in files_under(src, SIGNAL_SUFFIXES) if path.parent != src}
    is_split = {top: top.lower() in SPLIT_WORDS for top in tops}
    if any(is_split.values()) and not all(is_split.values()):
        mixed = next(top for top, yes in is_split.items() if yes)
        raise DataError(f"{src}: '{mixed}' names a split but lies beside class folders; rename it or sort it in")
    published = bool(tops) and all(is_split.values())
    for file in files_under(src):
        parts = file.relative_to(src).parts
        split, inside = (SPLIT_WORDS[parts[0].lower()], parts[1:]) if published and len(parts) > 1 else (None, parts)
        if file.suffix.lower() not in SIGNAL_SUFFIXES:
            if len(inside) > 1:
                found.problems.setdefault("not a recording (left out)", []).append(Path(*parts).as_posix())
        elif len(inside) == 1:
            loose.append(Path(*parts).as_posix())
        else:
            found.sources.append(Source(file, inside[0], Path(*inside[1:]).with_suffix("").as_posix(), split))
    if loose and found.sources:
        found.problems["outside any class folder (left out)"] = loose
    _check_classes(src, found.sources, loose)
    return found


def loose_sources(src: Path) -> Found:
    """List the recordings of a folder without classes or splits; the label is the folder below ``src``.

    Raises:
        DataError: There are none.
    """
    files = files_under(src, SIGNAL_SUFFIXES)
    if not files:
        raise DataError(f"{src}: holds no WAV, CSV, NPY or MAT file; give the folder of the recordings")
    return Found([Source(file, file.parent.relative_to(src).as_posix(), file.stem) for file in files])


def part_pattern(sources: Sequence[Source], group: str | None, signals_per_part: int | None) -> str:
    """Return the regular expression that names an item's part in its stem.

    Raises:
        ConfigError: ``group`` is not a regular expression.
        DataError: It does not match every file: the others would fall apart into single signals.
    """
    if signals_per_part is not None:
        return WHOLE
    if group is None:
        return FOLDER_OR_FILE
    if group == SIMILAR_GROUP:
        raise ConfigError(f"group={group}: is for photographs; give a regular expression that finds the part in a name")
    try:
        expression = re.compile(group)
    except re.error as error:
        raise ConfigError(f"group={group}: not a regular expression ({error})") from error
    missed = [source for source in sources if not expression.search(source.stem)]
    if missed:
        raise DataError(
            f"{missed[0].file}: group={group} does not match '{missed[0].stem}' ({len(missed)} of {len(sources)} "
            "files); write it so that it finds the part in every name"
        )
    return group


def split_by_part(items: Sequence[Item], spec: SplitSpec) -> Assignment:
    """Decide the split of every image; images of one part never part.

    A random split is stratified by class; then every class that a split lacks gets one part moved there, training
    before validation before test, as long as it has parts enough.

    Args:
        items: One an image; equal digests mean the same signal.
        spec: How to split; ``group`` finds the part in an item's stem.

    Raises:
        ConfigError: A way of splitting that signals do not have.
        DataError: A class has too few parts for training and validation, or for the folds; one line.
    """
    if spec.method == "lists" or spec.lists is not None:
        raise ConfigError("split=FOLDER: lists are not read for signals; sort the files into train/ val/ test/ folders")
    groups = group_items(items, spec.group)
    published = {item.published for item in items} - {None}
    if spec.method == "published" and not published:
        raise DataError("split=published: the class folders do not lie in train/ val/ test/; use split=auto")
    if published and spec.method in {"auto", "published"} and "val" in published:
        return _as_published(items, groups, spec)
    if published and (spec.method == "published" or (spec.method == "auto" and len(published) > 1)):
        return _val_from_train(items, groups, spec)
    if spec.method == "kfold":
        return _fold(items, groups, spec)
    parts = stratify([item.labels for item in items], groups, spec.ratios, spec.seed)
    result = Assignment({item.key: SPLITS[part] for item, part in zip(items, parts, strict=True)}, [], [])
    shown = "/".join(f"{share:g}" for share in spec.ratios)
    result.decisions.append(f"stratified random split {shown} by part, seed {spec.seed}")
    cover(items, groups, result, SPLITS if spec.ratios[2] else SPLITS[:2])
    return result


def cover(items: Sequence[Item], groups: Sequence[int], result: Assignment, wanted: Sequence[str]) -> None:
    """Move single parts so that every wanted split holds every class, in place.

    A part moves only if its classes keep another part where it was, or from a less important split.

    Raises:
        DataError: A class has too few parts for training and validation.
    """
    home = {group: result.split[item.key] for item, group in zip(items, groups, strict=True)}
    labels: dict[int, set[str]] = defaultdict(set)
    for item, group in zip(items, groups, strict=True):
        labels[group] |= item.labels
    size = Counter(groups)
    for place, split in enumerate(wanted):
        for label in sorted(set().union(*labels.values())):
            own = [group for group in labels if label in labels[group]]
            if any(home[group] == split for group in own):
                continue
            count = Counter((home[group], name) for group in labels for name in labels[group])
            free = [
                group
                for group in own
                if home[group] in wanted[place + 1 :]
                or (home[group] in wanted and all(count[home[group], name] > 1 for name in labels[group]))
            ]
            if free:
                home[min(free, key=lambda group: (size[group], group))] = split
            elif split == "test":
                result.decisions.append(f"WARNING: class '{label}' has {len(own)} parts only, none left for test")
            else:
                raise DataError(_too_few(label, [item for item in items if label in item.labels], len(own)))
    result.split.update({item.key: home[group] for item, group in zip(items, groups, strict=True)})


def _check_classes(src: Path, sources: Sequence[Source], loose: Sequence[str]) -> None:
    names = sorted({source.label for source in sources})
    if not names:
        what = f"{len(loose)} recordings but no class folders" if loose else "no WAV, CSV, NPY or MAT file"
        raise DataError(f"{src}: holds {what}; sort recordings into src/CLASS/FILE, for example normal/ and crack/")
    if len(names) < 2:
        raise DataError(f"{src}: holds one class folder with recordings only ('{names[0]}'); a classifier needs two")


def _names(items: Sequence[Item]) -> list[str]:
    return sorted({label for item in items for label in item.labels})


def _too_few(label: str, items: Sequence[Item], count: int) -> str:
    return (
        f"class '{label}': its {len(items)} images come from {count} part{'s' * (count != 1)} ('{items[0].stem}'"
        f"{' ...' * (count > 1)}), too few for training and validation; record more parts, or, if its signals are of "
        "different parts, say so with signals_per_part=1 or group=REGEX"
    )


def _as_published(items: Sequence[Item], groups: list[int], spec: SplitSpec) -> Assignment:
    result = assign(items, replace(spec, method="published"))
    for split in ("train", "val"):
        gone = set(_names(items)) - set(_names([item for item in items if item.published == split]))
        if gone:
            raise DataError(f"{split}/ holds nothing of class '{min(gone)}'; add it, or use split=random")
    places: dict[int, set[str]] = defaultdict(set)
    for item, group in zip(items, groups, strict=True):
        places[group].add(result.split[item.key])
    torn = sum(len(splits) > 1 for splits in places.values())
    if torn:
        result.decisions.append(f"WARNING: {torn} parts are in two published splits; split=random keeps them together")
    return result


def _val_from_train(items: Sequence[Item], groups: list[int], spec: SplitSpec) -> Assignment:
    split = {item.key: str(item.published) for item in items}
    result = Assignment(split, [f"split as published; {spec.val_share:g} of train set aside as val by part"], [])
    _set_aside(items, groups, spec, result)
    return result


def _fold(items: Sequence[Item], groups: list[int], spec: SplitSpec) -> Assignment:
    for label in _names(items):
        own = [group for item, group in zip(items, groups, strict=True) if label in item.labels]
        if len(set(own)) < spec.folds:
            raise DataError(f"class '{label}' has {len(set(own))} parts, too few for {spec.folds} folds; use fewer")
    parts = stratify([item.labels for item in items], groups, [1 / spec.folds] * spec.folds, spec.seed)
    split = {item.key: "test" if part == spec.fold else "train" for item, part in zip(items, parts, strict=True)}
    decision = f"fold {spec.fold} of {spec.folds} is test, {spec.val_share:g} of the rest is val, by part"
    result = Assignment(split, [f"{decision}, seed {spec.seed}"], [])
    _set_aside(items, groups, spec, result)
    return result


def _set_aside(items: Sequence[Item], groups: list[int], spec: SplitSpec, result: Assignment) -> None:
    """Make a part of train val, in place."""
    rows = [i for i, item in enumerate(items) if result.split[item.key] == "train"]
    gone = set(_names(items)) - set(_names([items[i] for i in rows]))
    if gone:
        raise DataError(f"no part of class '{min(gone)}' is left for training; record more parts, or split otherwise")
    shares = (1 - spec.val_share, spec.val_share)
    parts = stratify([items[i].labels for i in rows], [groups[i] for i in rows], shares, spec.seed)
    result.split.update({items[i].key: SPLITS[part] for i, part in zip(rows, parts, strict=True)})
    cover([items[i] for i in rows], [groups[i] for i in rows], result, SPLITS[:2])
