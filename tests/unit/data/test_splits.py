from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_yolo.data.grouping import Item
from kd_yolo.data.splits import SplitSpec, assign, expand_stems, parse_split, read_lists, stratify
from kd_yolo.errors import ConfigError, DataError


def make_items(count: int, classes: int = 3, seed: int = 0, published: str | None = None) -> list[Item]:
    rng = np.random.default_rng(seed)
    picks = [frozenset(f"c{c}" for c in range(classes) if rng.random() < 0.4) for _ in range(count)]
    return [Item(f"i{i}", f"i{i}", labels, f"d{i}", published) for i, labels in enumerate(picks)]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (0.2,) * 5, (0.9, 0.1, 0.0)]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_stratify__groups_stay_whole_and_empty_shares_stay_empty(
    sizes: list[int], shares: tuple[float, ...], seed: int
) -> None:
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    rng = np.random.default_rng(seed)
    labels = [frozenset(f"c{c}" for c in range(4) if rng.random() < 0.3) for _ in groups]
    parts = stratify(labels, groups, shares, seed)
    assert len(parts) == len(groups)
    assert all(len({p for p, g in zip(parts, groups, strict=True) if g == group}) == 1 for group in set(groups))
    assert all(shares[part] > 0 for part in parts)
    assert parts == stratify(labels, groups, shares, seed)


@pytest.mark.parametrize("seed", range(5))
def test_stratify__every_class_gets_its_share(seed: int) -> None:
    items = make_items(600, classes=5, seed=seed)
    parts = stratify([item.labels for item in items], list(range(600)), (0.8, 0.1, 0.1), seed)
    assert Counter(parts) == {0: 480, 1: 60, 2: 60}
    for name in (f"c{i}" for i in range(5)):
        rows = [part for item, part in zip(items, parts, strict=True) if name in item.labels]
        for part, share in enumerate((0.8, 0.1, 0.1)):
            assert rows.count(part) == pytest.approx(share * len(rows), abs=0.03 * len(rows))


def test_stratify__rare_classes_do_not_starve_the_small_parts() -> None:
    # 20 classes of one image each: by class alone every image would go to the biggest part
    labels = [frozenset({f"c{i}"}) for i in range(20)]
    assert Counter(stratify(labels, list(range(20)), (0.8, 0.1, 0.1), 0)) == {0: 16, 1: 2, 2: 2}


def test_assign__same_bytes_stay_together_and_a_plain_shuffle_would_not() -> None:
    items = [Item(f"i{i}", f"i{i}", frozenset({"a"}), f"d{i // 2}") for i in range(100)]
    split = assign(items, SplitSpec(method="random", ratios=(0.5, 0.25, 0.25))).split
    assert all(split[f"i{i}"] == split[f"i{i + 1}"] for i in range(0, 100, 2))
    apart = [Item(item.key, item.stem, item.labels, item.key) for item in items]  # the twin without content hashes
    split = assign(apart, SplitSpec(method="random", ratios=(0.5, 0.25, 0.25))).split
    assert any(split[f"i{i}"] != split[f"i{i + 1}"] for i in range(0, 100, 2))


def test_assign__group_expression_keeps_boards_together() -> None:
    items = [
        Item(f"{b:02d}_short_{i}", f"{b:02d}_short_{i}", frozenset({"s"}), f"{b}/{i}")
        for b in range(10)
        for i in range(6)
    ]
    split = assign(items, SplitSpec(method="random", group=r"^(\d+)_")).split
    assert all(len({part for key, part in split.items() if key.startswith(f"{b:02d}_")}) == 1 for b in range(10))
    assert Counter(split.values()) == {"train": 48, "val": 6, "test": 6}


def test_assign__folds_are_disjoint_and_cover_everything() -> None:
    items = make_items(53)
    tests: list[str] = []
    for fold in range(5):
        split = assign(items, SplitSpec(method="kfold", folds=5, fold=fold)).split
        assert set(split) == {item.key for item in items}
        assert {"train", "val", "test"} == set(split.values())
        tests += [key for key, part in split.items() if part == "test"]
    assert sorted(tests) == sorted(item.key for item in items)


def test_assign__published_split_is_kept_and_lacking_val_is_set_aside() -> None:
    items = make_items(40, published="train") + [
        Item(f"t{i}", f"t{i}", frozenset({"c0"}), f"t{i}", "test") for i in range(9)
    ]
    result = assign(items, SplitSpec())
    assert Counter(result.split.values()) == {"train": 36, "val": 4, "test": 9}
    assert all(result.split[f"t{i}"] == "test" for i in range(9))


def test_assign__one_published_folder_is_no_split() -> None:
    assert Counter(assign(make_items(20, published="train"), SplitSpec()).split.values()) == {
        "train": 16,
        "val": 2,
        "test": 2,
    }


def test_assign__fixed_split_is_used_only_when_all_of_it_is_there() -> None:
    spec = SplitSpec(fixed={"val": "i{1,2}", "test": "i7"})
    split = assign(make_items(10), spec).split
    assert {key for key, part in split.items() if part == "val"} == {"i1", "i2"}
    assert {key for key, part in split.items() if part == "test"} == {"i7"}
    result = assign(make_items(7), spec)  # i7 is not there
    assert "stratified random" in result.decisions[0]


def test_assign__lists(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("i0.jpg\nsome/folder/i1.png\n\ni2\n")
    (tmp_path / "valid.txt").write_text("i3\n")
    result = assign(make_items(5), SplitSpec(method="lists", lists=tmp_path))
    assert result.split == {"i0": "train", "i1": "train", "i2": "train", "i3": "val"}
    assert result.left_out == ["i4"]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [("i0\ni9\n", "i1\n", "'i9' has no usable image"), ("i0\ni1\n", "i1\n", "'i1' is in train and in val")],
)
def test_assign__wrong_lists(tmp_path: Path, train: str, val: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "val.txt").write_text(val)
    with pytest.raises(DataError, match=message):
        assign(make_items(4), SplitSpec(method="lists", lists=tmp_path))


def test_assign__lists_that_separate_equal_images_are_followed_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("i0\n")
    (tmp_path / "val.txt").write_text("i1\n")
    items = [Item(f"i{i}", f"i{i}", frozenset({"a"}), "same") for i in range(2)]
    result = assign(items, SplitSpec(method="lists", lists=tmp_path))
    assert result.split == {"i0": "train", "i1": "val"}
    assert "WARNING: 1 images are in two splits" in result.decisions[-1]


def test_assign__too_few_images() -> None:
    with pytest.raises(DataError, match="'val' part would be empty"):
        assign(make_items(1), SplitSpec())
    with pytest.raises(DataError, match="no usable image"):
        assign([], SplitSpec())


def test_read_lists__needs_train_and_val(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"train\.txt and val\.txt are needed; found train"):
        read_lists(tmp_path)


def test_expand_stems() -> None:
    assert expand_stems("crack_{1,4} spot_7\n rolled-in_scale_{2}") == [
        "crack_1",
        "crack_4",
        "spot_7",
        "rolled-in_scale_2",
    ]


@pytest.mark.parametrize("text", ["8:1:1", "0.8/0.1/0.1", "80,10,10"])
def test_parse_split__ratios(text: str) -> None:
    spec = parse_split(text, seed=3, group="x")
    assert spec.method == "random"
    assert spec.ratios == pytest.approx((0.8, 0.1, 0.1))
    assert (spec.seed, spec.group) == (3, "x")


def test_parse_split__others(tmp_path: Path) -> None:
    assert parse_split("auto").method == "auto"
    assert parse_split("published").method == "published"
    assert parse_split(str(tmp_path)).lists == tmp_path
    fold = parse_split("kfold:4:2")
    assert (fold.method, fold.folds, fold.fold) == ("kfold", 4, 2)


@pytest.mark.parametrize("text", ["", "kfold:5:5", "kfold:1", "0/1/1", "8:1", "thirds", "kfold:a"])
def test_parse_split__refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_split(text)


def test_assign__bad_group_expression() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        assign(make_items(5), SplitSpec(group="("))
