from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_yolo.anomaly import synthetic
from kd_yolo.anomaly.synthetic import DEFECTS, draw_surface, ensure_surface_synth, make_surface_synth
from kd_yolo.errors import ConfigError, OutputError

SMALL = {"train": 2, "normal": 1, "defects": 4, "seed": 0, "imgsz": 64}


def made(out: Path, **keys: int) -> Path:
    arguments: dict[str, Any] = {**SMALL, **keys}
    return make_surface_synth(out, **arguments)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*.png"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_make__same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, other = (digest(made(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == second
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if "ground_truth" not in name)
    assert len(set(first.values())) == len(first)  # no image twice
    assert "ground_truth/scratch/003_mask.png" in first


@pytest.mark.parametrize("kind", DEFECTS)
def test_draw__the_mask_marks_what_differs(kind: str) -> None:
    for seed in range(4):
        image, mask = draw_surface(np.random.default_rng(seed), kind, 128)
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape == mask.shape == (128, 128)
        assert 15 <= mask.sum() < 0.3 * mask.size
        inside, outside = image[mask > 0].astype(float), image[mask == 0].astype(float)
        # brightness differs, or (foreign) the grain: neighbouring pixels differ more
        rough = np.abs(np.diff(image.astype(float), axis=1))
        marked = (mask[:, 1:] & mask[:, :-1]) > 0
        contrast = abs(inside.mean() - outside.mean()) / outside.std()
        assert contrast > 0.5 or rough[marked].mean() > 1.3 * rough[~marked].mean()


def test_draw__normal_has_no_mask() -> None:
    assert draw_surface(np.random.default_rng(0), None, 64)[1].sum() == 0


def test_ensure__made_once_and_anew_for_other_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    make = synthetic.make_surface_synth

    def counted(*args: Any, **keys: Any) -> Path:
        calls.append(1)
        return make(*args, **keys)

    monkeypatch.setattr(synthetic, "make_surface_synth", counted)
    home = tmp_path / "surface-synth"
    for _ in range(2):
        assert ensure_surface_synth(home, SMALL) == home
    assert len(calls) == 1
    ensure_surface_synth(home, {**SMALL, "train": 3})
    assert len(calls) == 2
    assert len(list((home / "train/good").iterdir())) == 3


def test_ensure__the_users_own_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "surface-synth").mkdir()
    (tmp_path / "surface-synth/mine.txt").write_text("x")
    with pytest.raises(OutputError, match="not made by kd-yolo"):
        ensure_surface_synth(tmp_path / "surface-synth", SMALL)


@pytest.mark.parametrize(("key", "value"), [("train", 0), ("defects", -1), ("imgsz", 32), ("seed", -1)])
def test_make__arguments_out_of_range(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=key):
        made(tmp_path / "a", **{key: value})
    assert not (tmp_path / "a").exists()
