from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_yolo.data.grouping import Item
from kd_yolo.data.signals_split import FOLDER_OR_FILE, WHOLE, Source, find_sources, part_pattern, split_by_part
from kd_yolo.data.splits import SplitSpec
from kd_yolo.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def rows(label: str, files: int, each: int, published: str | None = None) -> list[Item]:
    """Return ``each`` signals of every file."""
    return [
        Item(f"{label}/{published}{f}_{r}", f"{label}{published}{f}", frozenset({label}), f"{label}{published}{f}{r}",
             published)
        for f in range(files)
        for r in range(each)
    ]  # fmt: skip


def places(items: list[Item], split: dict[str, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for item in items:
        found.setdefault(item.stem, set()).add(split[item.key])
    return found


@given(
    files=st.lists(st.tuples(st.integers(2, 12), st.integers(1, 6)), min_size=2, max_size=4),
    seed=st.integers(0, 50),
    ratios=st.sampled_from([(0.8, 0.1, 0.1), (0.6, 0.2, 0.2), (0.9, 0.1, 0.0)]),
)
@settings(max_examples=80, deadline=None)
def test_split_by_part__parts_stay_whole_and_every_class_is_in_every_split(
    files: list[tuple[int, int]], seed: int, ratios: tuple[float, float, float]
) -> None:
    items = [item for c, (count, each) in enumerate(files) for item in rows(f"c{c}", count, each)]
    result = split_by_part(items, SplitSpec(method="random", ratios=ratios, seed=seed, group=WHOLE))
    assert all(len(splits) == 1 for splits in places(items, result.split).values())
    for c, (count, _) in enumerate(files):
        here = {result.split[item.key] for item in items if f"c{c}" in item.labels}
        wanted = {"train", "val", "test"} if ratios[2] and count >= 3 else {"train", "val"}
        assert here == wanted
        warned = any(f"class 'c{c}'" in decision for decision in result.decisions)
        assert warned == (count == 2 and ratios[2] > 0)


def test_split_by_part__every_fifth_row_to_test_would_leak_and_is_not_done() -> None:
    items = rows("n", 10, 50) + rows("d", 10, 50)
    naive = {item.key: "test" if i % 5 == 4 else "train" for i, item in enumerate(items)}
    assert all(splits == {"train", "test"} for splits in places(items, naive).values())  # the check sees that leak
    split = split_by_part(items, SplitSpec(group=FOLDER_OR_FILE)).split
    assert all(len(splits) == 1 for splits in places(items, split).values())


def test_split_by_part__equal_signals_stay_together() -> None:
    items = rows("a", 20, 1) + rows("b", 20, 1)
    twin = Item("a/copy", "acopy", frozenset({"a"}), items[3].digest)
    for seed in range(20):
        split = split_by_part([*items, twin], SplitSpec(seed=seed, group=WHOLE, ratios=(0.4, 0.3, 0.3))).split
        assert split["a/copy"] == split[items[3].key]


def test_split_by_part__one_part_of_a_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"class 'b': its 30 images come from 1 part \('bNone0'\).*signals_per_part=1"):
        split_by_part(rows("a", 9, 1) + rows("b", 1, 30), SplitSpec(group=WHOLE))


def test_split_by_part__parts_with_both_classes() -> None:
    # each part was recorded before and after it cracked: it must not be in two splits under two labels
    items = [
        Item(f"{label}/p{p}_{k}", f"p{p}", frozenset({label}), f"{label}{p}{k}")
        for label in ("crack", "normal")
        for p in range(12)
        for k in range(3)
    ]
    split = split_by_part(items, SplitSpec(group=WHOLE)).split
    assert all(len(splits) == 1 for splits in places(items, split).values())
    assert set(split.values()) == {"train", "val", "test"}


def test_split_by_part__folds_cover_every_part_once() -> None:
    items = rows("a", 10, 3) + rows("b", 6, 4)
    tested = []
    for fold in range(5):
        result = split_by_part(items, SplitSpec(method="kfold", folds=5, fold=fold, group=WHOLE))
        assert all(len(splits) == 1 for splits in places(items, result.split).values())
        assert {result.split[i.key] for i in items if "b" in i.labels} >= {"train", "val"}
        tested += [stem for stem, splits in places(items, result.split).items() if splits == {"test"}]
    assert sorted(tested) == sorted({item.stem for item in items})
    with pytest.raises(DataError, match="class 'b' has 6 parts, too few for 7 folds"):
        split_by_part(items, SplitSpec(method="kfold", folds=7, group=WHOLE))


def test_split_by_part__published() -> None:
    items = [i for s in ("train", "val", "test") for label in ("a", "b") for i in rows(label, 4, 1, s)]
    result = split_by_part(items, SplitSpec(group=WHOLE))
    assert all(result.split[item.key] == item.published for item in items)
    without = [item for item in items if item.published != "val"]
    result = split_by_part(without, SplitSpec(group=WHOLE))
    assert {item.key for item in without if result.split[item.key] == "test"} == {
        item.key for item in items if item.published == "test"
    }
    assert {result.split[item.key] for item in without if "a" in item.labels} == {"train", "val", "test"}
    with pytest.raises(DataError, match="val/ holds nothing of class 'b'"):
        split_by_part([i for i in items if not (i.published == "val" and "b" in i.labels)], SplitSpec(group=WHOLE))


def test_split_by_part__published_split_that_tears_a_part_is_reported() -> None:
    items = [Item(f"a/{s}", "same", frozenset({"a"}), s, s) for s in ("train", "val")]
    items += [Item(f"b/{s}", f"b{s}", frozenset({"b"}), "b" + s, s) for s in ("train", "val")]
    decisions = split_by_part(items, SplitSpec(group=WHOLE)).decisions
    assert any("1 parts are in two published splits" in decision for decision in decisions)


def test_split_by_part__ways_that_signals_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lists are not read for signals"):
        split_by_part(rows("a", 4, 1), SplitSpec(method="lists", lists=tmp_path))
    with pytest.raises(DataError, match="split=published"):
        split_by_part(rows("a", 4, 1), SplitSpec(method="published"))


def test_find_sources__classes_parts_and_what_is_left_out(tmp_path: Path) -> None:
    src = touch(tmp_path, "ok/p1/a.wav", "ok/b.CSV", "bad/c.npy", "bad/d.mat", "bad/notes.txt", "e.wav", "readme.md",
                ".hidden/x.wav")  # fmt: skip
    found = find_sources(src)
    assert [(s.label, s.stem, s.published) for s in found.sources] == [
        ("bad", "c", None), ("bad", "d", None), ("ok", "b", None), ("ok", "p1/a", None),
    ]  # fmt: skip
    assert found.problems == {
        "not a recording (left out)": ["bad/notes.txt"],
        "outside any class folder (left out)": ["e.wav"],
    }


def test_find_sources__published_folders(tmp_path: Path) -> None:
    src = touch(tmp_path, "Train/a/1.wav", "validation/a/2.wav", "test/b/3.wav")
    assert [(s.label, s.published) for s in find_sources(src).sources] == [("a", "train"), ("b", "test"), ("a", "val")]


@pytest.mark.parametrize(("names", "message"), [
    ([], "holds no WAV, CSV, NPY or MAT file"),
    (["a.wav", "b.wav"], "holds 2 recordings but no class folders"),
    (["ok/a.wav"], r"one class folder with recordings only \('ok'\)"),
    (["train/ok/a.wav", "ok/b.wav"], "'train' names a split but lies beside class folders"),
    (["train/a.wav", "val/b.wav"], "holds 2 recordings but no class folders"),
])  # fmt: skip
def test_find_sources__not_a_set(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_sources(touch(tmp_path, *names))


def test_part_pattern__every_file_must_match() -> None:
    sources = [Source(Path(f"{i}.wav"), "a", f"part_{i}" if i else "other") for i in range(4)]
    assert part_pattern(sources, None, None) == FOLDER_OR_FILE
    assert part_pattern(sources, None, 3) == WHOLE
    assert part_pattern(sources[1:], r"part_(\d+)", None) == r"part_(\d+)"
    with pytest.raises(DataError, match=r"does not match 'other' \(1 of 4 files\)"):
        part_pattern(sources, r"part_(\d+)", None)
    with pytest.raises(ConfigError, match="not a regular expression"):
        part_pattern(sources, "part_(", None)
    with pytest.raises(ConfigError, match="is for photographs"):
        part_pattern(sources, "similar", None)


def test_part_pattern__a_sub_folder_is_a_part() -> None:
    items = [
        Item(f"{label}/{p}_{k}", f"{label}{p}/{k}", frozenset({label}), f"{label}{p}{k}")
        for label in "ab"
        for p in range(5)
        for k in range(4)
    ]
    split = split_by_part(items, SplitSpec(group=part_pattern([], None, None))).split
    for item in items:
        mates = [other for other in items if other.stem.split("/")[0] == item.stem.split("/")[0]]
        assert len({split[mate.key] for mate in mates}) == 1
    assert np.unique(list(split.values())).tolist() == ["test", "train", "val"]
