from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from data_factory import NEU, label_rows, read_pixels

from kd_yolo.data.steel import DRAW, STYLES, Image, Region, distract, field, grain, surface
from kd_yolo.data.synthetic import NAMES, make_image, make_steel_synth
from kd_yolo.data.validate import validate_for_training
from kd_yolo.errors import ConfigError, OutputError
from kd_yolo.resources import find, load_yaml


def digest(folder: Path) -> str:
    """Digest of every image and label, names included."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in {".jpg", ".txt"}):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_steel_synth(tmp_path_factory.mktemp("synth") / "steel", train=60, val=12, test=12)


def test_make_steel_synth__classes_are_those_of_neu(made: Path) -> None:
    names = dict(enumerate(NEU))
    assert yaml.safe_load(made.read_text())["names"] == names
    for builtin in ("neu", "steel-synth"):
        assert load_yaml(find("datasets", builtin))["names"] == names
    assert NAMES == NEU


def test_make_steel_synth__layout(made: Path) -> None:
    folder = made.parent
    validate_for_training(made)
    for split, count in (("train", 60), ("val", 12), ("test", 12)):
        images = sorted((folder / "images" / split).glob("*.jpg"))
        assert len(images) == len(list((folder / "labels" / split).glob("*.txt"))) == count
        first = read_pixels(images[0], cv2.IMREAD_UNCHANGED)
        assert first.shape == (200, 200)  # grey: one channel
    assert json.loads((folder / "conversion.json").read_text())["arguments"]["train"] == 60


def test_make_steel_synth__boxes(made: Path) -> None:
    rows = label_rows(made.parent / "labels")
    counts = [len(boxes) for boxes in rows.values()]
    assert max(counts) <= 4
    assert 0 < counts.count(0) < 12  # some images have no defect
    assert any(len({box[0] for box in boxes}) > 1 for boxes in rows.values())
    assert {box[0] for boxes in rows.values() for box in boxes} == set(range(6))
    for boxes in rows.values():
        for _, x, y, w, h in boxes:
            assert min(w, h) * 200 >= 4
            assert min(x - w / 2, y - h / 2) >= -1e-6
            assert max(x + w / 2, y + h / 2) <= 1 + 1e-6


def test_make_steel_synth__bit_identical_in_another_process(made: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import sys; from kd_yolo.data.synthetic import make_steel_synth;"
        "make_steel_synth(Path(sys.argv[1]), train=60, val=12, test=12)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment)
    assert digest(tmp_path / "again") == digest(made.parent)


def test_make_steel_synth__an_image_depends_on_its_number_alone(made: Path, tmp_path: Path) -> None:
    smaller = make_steel_synth(tmp_path / "few", train=3, val=2, test=1).parent
    for path in smaller.rglob("*.jpg"):
        assert path.read_bytes() == (made.parent / path.relative_to(smaller)).read_bytes()
    other = make_steel_synth(tmp_path / "other", train=3, val=2, test=1, seed=1).parent
    assert digest(other) != digest(smaller)


def test_make_steel_synth__splits_share_no_image(made: Path) -> None:
    images = [path.read_bytes() for path in made.parent.rglob("*.jpg")]
    assert len(images) == len(set(images)) == 84


@pytest.mark.parametrize("imgsz", [64, 320])
def test_make_steel_synth__other_sizes(tmp_path: Path, imgsz: int) -> None:
    folder = make_steel_synth(tmp_path / "out", train=6, val=1, test=0, imgsz=imgsz).parent
    assert read_pixels(next((folder / "images/train").glob("*.jpg"))).shape == (imgsz, imgsz, 3)
    assert "test" not in yaml.safe_load((folder / "data.yaml").read_text())


@pytest.mark.parametrize(
    "arguments", [{"train": 0}, {"val": 0}, {"test": -1}, {"imgsz": 16}, {"imgsz": 9999}, {"seed": -1}]
)
def test_make_steel_synth__refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        make_steel_synth(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_make_steel_synth__never_overwrites_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/keep.txt").write_text("x")
    with pytest.raises(OutputError):
        make_steel_synth(tmp_path / "mine", train=1, val=1, test=0)


@pytest.mark.parametrize("name", NEU)
@pytest.mark.parametrize("seed", range(4))
def test_draw__changes_the_image_only_near_its_mask(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    region: Region = (40.0, 50.0, 90.0, 30.0) if name == "crazing" else (60.0, 40.0, 60.0, 110.0)
    before: Image = surface(np.random.default_rng(seed), 200, "smooth")
    after = before.copy()
    mask = DRAW[name](rng, after, region, 40.0)
    assert mask.any()
    near = cv2.dilate(mask.astype(np.uint8), np.ones((25, 25), np.uint8)).astype(bool)
    assert np.abs(after - before)[~near].max() < 2
    strongest = np.abs(after - before)[mask]
    assert strongest.mean() > 8  # the true box surrounds something that is really there
    mean_change = float((after - before)[mask].mean())
    assert mean_change > 0 if name == "scratches" else mean_change < 0


@pytest.mark.parametrize("name", NEU)
def test_draw__box_is_tight(name: str) -> None:
    # the outermost mask pixels on every side carry a visible change, so the box cannot be loose
    image: Image = np.full((200, 200), 128, np.float32)
    mask = DRAW[name](np.random.default_rng(3), image, (50.0, 50.0, 100.0, 90.0), 60.0)
    changed = np.abs(image - 128) > 3
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    for line in (changed[:, columns[0] : columns[0] + 3], changed[:, columns[-1] - 2 : columns[-1] + 1]):
        assert line.any()
    for line in (changed[rows[0] : rows[0] + 3], changed[rows[-1] - 2 : rows[-1] + 1]):
        assert line.any()


@pytest.mark.parametrize("style", STYLES)
def test_surface__looks_like_steel_and_has_no_defect(style: str) -> None:
    images = [surface(np.random.default_rng(seed), 200, style) for seed in range(6)]
    for image in images:
        assert image.dtype == np.float32
        assert image.shape == (200, 200)
        assert 40 < image.mean() < 235
        assert 2 < image.std() < 60
    assert len({float(image.mean()) for image in images}) == 6


@pytest.mark.parametrize("noise", [field, grain])
def test_noise__unit(noise: object) -> None:
    values = noise(np.random.default_rng(0), 100, 4.0, 4.0)  # type: ignore[operator]
    assert values.shape == (100, 100)
    assert float(values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(values.std()) == pytest.approx(1, abs=1e-3)


def test_distract__adds_something_without_a_label() -> None:
    plain = surface(np.random.default_rng(0), 200, "smooth")
    changed = 0
    for seed in range(20):
        image = plain.copy()
        distract(np.random.default_rng(seed), image, 10.0)
        changed += float(np.abs(image - plain).max()) > 1
    assert changed >= 18


def test_make_image__surface_does_not_give_the_class_away() -> None:
    # one surface a class would give images of one brightness; several surfaces spread it
    for class_id in range(6):
        means = [make_image(np.random.default_rng([9, class_id, i]), class_id)[0].mean() for i in range(12)]
        assert np.std(means) > 12
