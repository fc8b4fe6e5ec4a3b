from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kd_yolo.data.grouping import Item, group_items
from kd_yolo.data.splits import SplitSpec, assign


def exposures(folder: Path, parts: int = 8, shots: int = 4) -> list[Item]:
    """Photograph each part several times: other brightness, contrast, lighting and noise, unrelated names."""
    items = []
    for part in range(parts):
        rng = np.random.default_rng(part)
        texture = cv2.resize(rng.normal(0, 1, (25, 25)).astype(np.float32), (200, 200), interpolation=cv2.INTER_CUBIC)
        for shot in range(shots):
            light = np.linspace(-1, 1, 200, dtype=np.float32)[None] * 12 * (shot - 1.5)
            image = 90 + 15 * shot + (14 + 4 * shot) * texture + light + rng.normal(0, 3, (200, 200))
            path = folder / f"photo_{(37 * (part * shots + shot)) % 101}.png"
            cv2.imwrite(str(path), np.clip(image, 0, 255).astype(np.uint8))
            items.append(Item(path.stem, path.stem, frozenset({"a"}), path.stem, None, path))
    return items


def test_group_items__similar_finds_the_parts(tmp_path: Path) -> None:
    groups = group_items(exposures(tmp_path), "similar")
    assert [len(set(groups[i : i + 4])) for i in range(0, 32, 4)] == [1] * 8
    assert len(set(groups)) == 8


def test_group_items__without_it_they_are_strangers(tmp_path: Path) -> None:
    assert len(set(group_items(exposures(tmp_path), None))) == 32


def test_assign__similar_images_stay_on_one_side(tmp_path: Path) -> None:
    items = exposures(tmp_path)
    split = assign(items, SplitSpec(method="random", ratios=(0.5, 0.25, 0.25), group="similar")).split
    sides = [split[item.key] for item in items]
    assert [len(set(sides[i : i + 4])) for i in range(0, 32, 4)] == [1] * 8


def test_group_items__flat_images_are_not_alike(tmp_path: Path) -> None:
    items = []
    for value in (10, 100, 200):
        path = tmp_path / f"{value}.png"
        cv2.imwrite(str(path), np.full((50, 50), value, np.uint8))
        items.append(Item(path.stem, path.stem, frozenset(), path.stem, None, path))
    assert len(set(group_items(items, "similar"))) == 3


def test_group_items__groups_chain() -> None:
    # a-b by bytes, b-c by name: all three belong together
    items = [
        Item("1", "x_1", frozenset(), "same"),
        Item("2", "y_1", frozenset(), "same"),
        Item("3", "y_2", frozenset(), "other"),
        Item("4", "z_1", frozenset(), "last"),
    ]
    groups = group_items(items, r"^(\w)_")
    assert groups[0] == groups[1] == groups[2] != groups[3]


@pytest.mark.parametrize("pattern", [r"^(\d+)_", r"^\d+"])
def test_group_items__without_brackets_the_whole_match_counts(pattern: str) -> None:
    items = [Item(s, s, frozenset(), s) for s in ("01_a", "01_b", "02_a", "none")]
    groups = group_items(items, pattern)
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3
