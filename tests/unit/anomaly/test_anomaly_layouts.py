from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from anomaly_factory import btad_tree, mvtec_tree, square_mask, tile_tree, write_photo, write_pixels
from ultralytics.utils import LOGGER

from kd_yolo.anomaly import layouts
from kd_yolo.anomaly.layouts import AnomalyData, categories, describe_anomaly_datasets, read_anomaly_data
from kd_yolo.data.pixels import look
from kd_yolo.errors import ConfigError, DataError, KDYoloError


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the warnings given from now on."""
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", said.append)
    monkeypatch.setattr(layouts, "_SAID", set())
    return said


def write_yaml(file: Path, **keys: object) -> Path:
    file.write_text(yaml.safe_dump(keys))
    return file


def fails(data: Path | str, *words: str, category: str | None = None, root: Path | None = None) -> str:
    with pytest.raises(KDYoloError) as caught:
        read_anomaly_data(data, category, root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def shape(data: AnomalyData) -> tuple[int, Counter[str]]:
    return len(data.train), Counter(sample.defect for sample in data.test)


def test_read__mvtec(tmp_path: Path) -> None:
    mvtec_tree(tmp_path / "mvtec/screw")
    mvtec_tree(tmp_path / "mvtec/tile", train=3)
    assert categories(tmp_path / "mvtec") == ["screw", "tile"]
    data = read_anomaly_data(tmp_path / "mvtec", "screw")
    assert data.format == "mvtec"
    assert shape(data) == (4, Counter(good=2, crack=2, hole=2))
    assert [sample.label for sample in data.test] == [0, 0, 1, 1, 1, 1]
    for sample in data.test[2:]:  # stems repeat across folders: the mask must be of the same folder
        assert sample.mask is not None
        assert (sample.mask.parent.name, sample.mask.stem) == (sample.defect, f"{sample.image.stem}_mask")
    assert all(sample.mask is None and sample.label == 0 for sample in data.train)
    assert "4 normal images to train on, test: 2 normal and 4 anomalous" in data.describe()


def test_read__one_category_needs_no_name(tmp_path: Path) -> None:
    screw = mvtec_tree(tmp_path / "mvtec/screw")
    assert read_anomaly_data(screw).category == read_anomaly_data(tmp_path / "mvtec").category == "screw"
    assert categories(screw) == ["screw"]
    assert read_anomaly_data(tmp_path / "mvtec", "all").category == "screw"


def test_read__btad_bmp_images_with_png_masks(tmp_path: Path) -> None:
    btad_tree(tmp_path / "btad/01")
    btad_tree(tmp_path / "btad/02")
    data = read_anomaly_data(tmp_path / "btad", "01")
    assert data.format == "btad"
    assert shape(data) == (2, Counter(good=1, ko=2))
    assert [(s.image.suffix, s.mask.suffix if s.mask else None) for s in data.test[1:]] == [(".bmp", ".png")] * 2
    assert read_anomaly_data(tmp_path / "btad", 2).category == "02"  # what 02 becomes on a command line


@pytest.mark.parametrize("normal", ["normal", "OK", "Good", "ok"])
def test_read__plain_folder(tmp_path: Path, normal: str) -> None:
    for index, folder in enumerate((f"train/{normal}", f"train/{normal}", f"test/{normal}", "test/bad")):
        write_photo(tmp_path / "parts" / folder / f"photo {index}.jpg", index)
    data = read_anomaly_data(tmp_path / "parts")
    assert data.format == ("btad" if normal == "ok" else "folder")
    assert shape(data) == (2, Counter(good=1, bad=1))


def test_read__only_normal_images_are_enough_to_train(tmp_path: Path) -> None:
    write_photo(tmp_path / "parts/train/good/1.png", 1)
    data = read_anomaly_data(tmp_path / "parts")
    assert (len(data.train), data.test) == (1, [])
    assert "nothing can be measured" in data.warnings[0]


def test_read__images_that_are_not_looked_at_are_said(tmp_path: Path) -> None:
    root = tmp_path / "parts"
    write_photo(root / "train/gut/1.png", 1)
    write_photo(root / "test/scratch/1.png", 2)
    write_photo(root / "test/scratch/cam1/2.png", 3)
    write_photo(root / "test/loose.png", 4)
    data = read_anomaly_data(write_yaml(tmp_path / "m.yaml", path="parts", normal="gut"))
    said = "\n".join(data.warnings)
    assert f"{root / 'test'}: 1 images not used" in said
    assert f"{root / 'test/scratch/cam1'}: 1 images not used" in said
    assert "no folder of normal images (gut), so every image there counts as anomalous" in said


def test_read__a_mask_suffix_is_taken_off_as_a_whole(tmp_path: Path) -> None:
    # stripping the characters of "_mask" would turn both into "bea" or worse
    root = tmp_path / "parts"
    write_photo(root / "train/good/0.png", 0)
    for seed, stem in enumerate(("beaks", "beam", "a_mask_k")):
        write_photo(root / f"test/bad/{stem}.png", 10 + seed)
        write_pixels(root / f"ground_truth/bad/{stem}_mask.png", square_mask())
    found = {s.image.stem: s.mask.stem for s in read_anomaly_data(root).test if s.mask}
    assert found == {stem: f"{stem}_mask" for stem in ("beaks", "beam", "a_mask_k")}


def test_read__tile_divides_without_leaks(tmp_path: Path, heard: list[str]) -> None:
    data = read_anomaly_data(tile_tree(tmp_path / "tiles"))
    assert data.format == "masks"
    assert Counter(sample.defect for sample in data.test if sample.label) == Counter(Crack=2)
    normal = [sample for sample in data.test if not sample.label]
    assert len(data.train) + len(normal) == 12
    looks = {s.image: look(np.asarray(cv2.imread(str(s.image)), np.uint8)) for s in [*data.train, *data.test]}
    for seen in data.train:
        for held in data.test:
            assert float(looks[seen.image] @ looks[held.image]) < 0.95
    # the first pair shows the tile of a cracked one
    assert {"exp0_num_1000", "exp1_num_1007"} <= {sample.image.stem for sample in normal}
    assert len(heard) == 1
    assert "2 of 4 defect images left out: 1 have an empty mask; 1 more hold only regions under 10 pixels" in heard[0]
    assert "exp1_num_3.png" in heard[0]  # the truly empty one
    assert {sample.min_area for sample in data.test if sample.label} == {10}


def test_read__tile_specks_kept_when_asked(tmp_path: Path, heard: list[str]) -> None:
    file = write_yaml(tmp_path / "tiles.yaml", path=str(tile_tree(tmp_path / "tiles")), min_area=1)
    assert len([sample for sample in read_anomaly_data(file).test if sample.label]) == 3
    assert "1 of 4 defect images left out: 1 have an empty mask (first" in heard[0]


def test_read__tile_split_depends_on_seed_and_share_only(tmp_path: Path) -> None:
    root = tile_tree(tmp_path / "tiles", free=24)

    def trained(**keys: object) -> set[str]:
        file = write_yaml(tmp_path / "t.yaml", path=str(root), **keys)
        return {sample.image.name for sample in read_anomaly_data(file).train}

    assert trained() == trained()
    assert trained(seed=0) == trained()
    assert any(trained(seed=seed) != trained() for seed in (1, 2, 3))
    assert len(trained(train_share=0.3)) < len(trained(train_share=0.8))


def test_read__user_yaml(tmp_path: Path) -> None:
    mvtec_tree(tmp_path / "lines/a")
    mvtec_tree(tmp_path / "lines/b", train=3)
    file = write_yaml(tmp_path / "mine.yaml", path="lines", category="b")
    data = read_anomaly_data(file)
    assert (data.name, data.category, len(data.train)) == ("mine", "b", 3)
    assert read_anomaly_data(file, "a").category == "a"  # what is asked for goes before the file
    assert categories(file) == ["a", "b"]


def test_read__user_yaml_names_the_normal_folder(tmp_path: Path) -> None:
    write_photo(tmp_path / "parts/train/pass/1.png", 1)
    write_photo(tmp_path / "parts/test/pass/2.png", 2)
    write_photo(tmp_path / "parts/test/good/3.png", 3)  # then "good" is no longer a normal folder
    file = write_yaml(tmp_path / "mine.yaml", path="parts", normal="pass")
    assert [(s.defect, s.label) for s in read_anomaly_data(file).test] == [("good", 0), ("good", 1)]


def test_read__validation_folder(tmp_path: Path) -> None:
    root = mvtec_tree(tmp_path / "screw")
    write_photo(root / "val/good/0.png", 901)
    write_photo(root / "val/crack/0.png", 902)
    write_pixels(root / "val/ground_truth/crack/0_mask.png", square_mask())
    data = read_anomaly_data(write_yaml(tmp_path / "mine.yaml", path="screw", val="val"))
    assert [(s.label, s.mask is not None) for s in data.val] == [(0, False), (1, True)]
    assert shape(data) == (4, Counter(good=2, crack=2, hole=2))


@pytest.mark.parametrize("missing", ["crack", "good"])
def test_read__validation_folder_of_one_label(tmp_path: Path, missing: str) -> None:
    root = mvtec_tree(tmp_path / "screw")
    write_photo(root / "val" / {"crack": "good", "good": "crack"}[missing] / "0.png", 901)
    file = write_yaml(tmp_path / "mine.yaml", path="screw", val="val")
    fails(file, "val=val", "no anomalous images" if missing == "crack" else "no normal images")
    if missing == "crack":
        fails(file, "cannot give thresholds", "leave out val")


def test_read__validation_folder_that_is_not_there(tmp_path: Path) -> None:
    mvtec_tree(tmp_path / "screw")
    fails(write_yaml(tmp_path / "mine.yaml", path="screw", val="vall"), "val=vall", "no such folder")


def test_read__mvtec_found_under_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KD_YOLO_SHARED", raising=False)
    mvtec_tree(tmp_path / "d/mvtec_anomaly_detection/screw")
    for name in ("mvtec", "mvtec.yaml"):
        data = read_anomaly_data(name, "screw", tmp_path / "d")
        assert (data.name, data.category) == ("mvtec", "screw")
    tile_tree(tmp_path / "d/magnetic-tile")
    assert read_anomaly_data("tile", root=tmp_path / "d").category == "magnetic-tile"
    btad_tree(tmp_path / "d/BTech_Dataset_transformed/01")
    assert categories("btad", tmp_path / "d") == ["01"]
    message = fails("mvtec", "MVTec AD", "data=FOLDER", root=tmp_path / "empty")
    assert "mvtec_anomaly_detection" in message


def test_read__surface_synth_is_made_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_yolo.anomaly import layout_source

    small = layout_source.AnomalyBuiltin(
        kd_yolo=1, title="t", origin="o", format="mvtec", make={"train": 2, "normal": 1, "defects": 4, "imgsz": 64}
    )
    monkeypatch.setattr(layout_source, "_builtin", lambda _: small)
    data = read_anomaly_data("surface-synth", root=tmp_path)
    assert shape(data) == (2, Counter(good=1, foreign=1, inclusion=1, patch=1, scratch=1))
    assert all(sample.mask for sample in data.test if sample.label)
    stamp = data.train[0].image.stat().st_mtime_ns
    assert read_anomaly_data("surface-synth", root=tmp_path).train[0].image.stat().st_mtime_ns == stamp


def test_describe__names_all_built_ins() -> None:
    assert set(describe_anomaly_datasets()) == {"mvtec", "btad", "magnetic-tile", "surface-synth"}


def test_fail__no_normal_images(tmp_path: Path) -> None:
    root = mvtec_tree(tmp_path / "screw")
    for file in (root / "train/good").iterdir():
        file.unlink()
    fails(root, "train/good: no images", "put the normal images")
    (root / "train/good").rename(root / "train/perfect")
    fails(root, "no folder of normal images", "perfect", "key normal")
    file = write_yaml(tmp_path / "m.yaml", path="screw", normal="perfekt")
    fails(file, "did you mean 'perfect'")


def test_fail__no_normal_tiles(tmp_path: Path) -> None:
    root = tile_tree(tmp_path / "tiles")
    for file in (root / "MT_Free/Imgs").iterdir():
        file.unlink()
    fails(root, "no normal images", "MT_Free")


def test_fail__mask_without_image(tmp_path: Path) -> None:
    root = mvtec_tree(tmp_path / "screw")
    lone = write_pixels(root / "ground_truth/hole/007_mask.png", square_mask())
    fails(root, str(lone), "mask without an image", "007")
    lone.unlink()
    lone = write_pixels(root / "ground_truth/dent/000_mask.png", square_mask())
    fails(root, str(lone), "mask without an image", "remove the mask")
    tiles = tile_tree(tmp_path / "tiles")
    (tiles / "MT_Crack/Imgs/exp1_num_1.jpg").unlink()
    fails(tiles, "exp1_num_1.png", "mask without an image")


def test_fail__two_masks_of_one_image(tmp_path: Path) -> None:
    root = mvtec_tree(tmp_path / "screw")
    write_pixels(root / "ground_truth/hole/000.png", square_mask())
    fails(root, "second mask of the image '000'", "remove one")


@pytest.mark.parametrize("tree", [mvtec_tree, tile_tree])
def test_fail__mask_of_another_size(tmp_path: Path, tree: Callable[[Path], Path]) -> None:
    root = tree(tmp_path / "screw")
    places = ("ground_truth/crack/001_mask.png", "MT_Crack/Imgs/exp1_num_1.png")
    file = next(root / place for place in places if (root / place).is_file())
    write_pixels(file, square_mask((20, 32)))
    fails(root, str(file), "32x20", "in the size of its image")


def test_read__empty_mask_is_left_out_and_said_once(tmp_path: Path, heard: list[str]) -> None:
    root = mvtec_tree(tmp_path / "screw")
    write_pixels(root / "ground_truth/hole/001_mask.png", np.zeros((24, 32), np.uint8))
    for _ in range(2):
        data = read_anomaly_data(root)
        assert shape(data) == (4, Counter(good=2, crack=2, hole=1))
        assert data.warnings == heard
    assert len(heard) == 1
    assert "1 of 4 defect images left out" in heard[0]
    assert "hole/001_mask.png" in heard[0]


def test_fail__masks_of_ones_instead_of_255(tmp_path: Path) -> None:
    root = mvtec_tree(tmp_path / "screw")
    for file in root.glob("ground_truth/*/*.png"):
        write_pixels(file, square_mask(value=1))
    fails(root, "all 4", "highest value 1", "write defect pixels as 255")


def test_read__missing_masks_are_said(tmp_path: Path, heard: list[str]) -> None:
    root = mvtec_tree(tmp_path / "screw")
    (root / "ground_truth/hole/001_mask.png").unlink()
    data = read_anomaly_data(root)
    assert [sample.has_truth for sample in data.test] == [True] * 5 + [False]
    assert "1 of 4 defect images have no mask" in heard[0]
    for file in root.glob("ground_truth/*/*.png"):
        file.unlink()
    read_anomaly_data(root)
    assert "only image-level metrics" in heard[1]


def test_fail__defect_mask_of_a_normal_image(tmp_path: Path) -> None:
    root = mvtec_tree(tmp_path / "screw")
    mask = write_pixels(root / "ground_truth/good/000_mask.png", np.zeros((24, 32), np.uint8))
    assert read_anomaly_data(root).test[0].mask is None  # an empty one is fine
    write_pixels(mask, square_mask())
    fails(root, str(mask), "36 pixels in a normal image")


def test_fail__category_that_is_not_there(tmp_path: Path) -> None:
    for name in ("screw", "transistor"):
        mvtec_tree(tmp_path / "mvtec" / name)
    fails(tmp_path / "mvtec", "category=transistr", "did you mean 'transistor'?", category="transistr")
    fails(tmp_path / "mvtec", "holds 2 categories (screw, transistor)", "category=all")
    fails(tmp_path / "mvtec/screw", "category=bottle", "there: screw", category="bottle")


def test_read__grey_and_colour_mixed_is_said(tmp_path: Path, heard: list[str]) -> None:
    root = mvtec_tree(tmp_path / "screw")
    write_photo(root / "train/good/100.png", 5, grey=True)
    read_anomaly_data(root)
    assert len(heard) == 1
    assert "1 grey and 10 colour images are mixed; all are converted to RGB" in heard[0]


def test_read__all_grey_is_fine(tmp_path: Path, heard: list[str]) -> None:
    for index in range(3):
        write_photo(tmp_path / "p" / ("train/good", "test/good", "test/bad")[index] / f"{index}.png", index, grey=True)
    read_anomaly_data(tmp_path / "p")
    assert [line for line in heard if "mixed" in line] == []


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_fail__unreadable_image(tmp_path: Path, content: bytes) -> None:
    root = mvtec_tree(tmp_path / "screw")
    bad = root / "train/good/002.png"
    bad.write_bytes(content)
    fails(root, str(bad), "replace the image or remove it")


def test_fail__unreadable_mask(tmp_path: Path) -> None:
    root = mvtec_tree(tmp_path / "screw")
    bad = root / "ground_truth/hole/001_mask.png"
    bad.write_bytes(bad.read_bytes()[:40])
    fails(root, str(bad), "mask", "replace it")


def test_read__training_images_in_test_are_said(tmp_path: Path, heard: list[str]) -> None:
    root = mvtec_tree(tmp_path / "screw")
    (root / "test/good/050.png").write_bytes((root / "train/good/001.png").read_bytes())
    read_anomaly_data(root)
    assert len(heard) == 1
    assert "1 test images are also training images, byte for byte" in heard[0]
    assert "test/good/050.png" in heard[0]
    assert "train/good/001.png" in heard[0]


def test_read__defects_among_training_images_are_said(tmp_path: Path, heard: list[str]) -> None:
    root = mvtec_tree(tmp_path / "screw")
    write_photo(root / "train/broken/0.png", 1)
    assert len(read_anomaly_data(root).train) == 4
    assert "train/broken: 1 images not used" in heard[0]


def test_fail__unknown_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'catgory'; did you mean 'category'"):
        read_anomaly_data(write_yaml(tmp_path / "m.yaml", path="x", catgory="screw"))
    with pytest.raises(ConfigError, match="missing key 'path'"):
        read_anomaly_data(write_yaml(tmp_path / "m.yaml", category="screw"))
    with pytest.raises(ConfigError, match="train_share=1"):
        read_anomaly_data(write_yaml(tmp_path / "m.yaml", path="x", train_share=1.5))


def test_fail__data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fails("mvtek", "did you mean 'mvtec'", "surface-synth")
    fails(write_yaml(tmp_path / "m.yaml", path="nowhere"), "path=nowhere is not a folder")
    (tmp_path / "stuff/things").mkdir(parents=True)
    fails("stuff", "no known layout", "train/good", "MT_Free")


def test_fail__too_few_tiles_to_divide(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few to divide"):
        read_anomaly_data(tile_tree(tmp_path / "tiles", free=2))


@pytest.mark.parametrize(("category", "expected"), [("screw", (320, 41, 119)), ("transistor", (213, 60, 40))])
def test_read__real_mvtec(shared: Path, category: str, expected: tuple[int, int, int], heard: list[str]) -> None:
    root = shared / "datasets/mvtec"
    if not (root / category).is_dir():
        pytest.skip(f"no MVTec AD at {root}")
    data = read_anomaly_data(root, category)
    defects = sum(sample.label for sample in data.test)
    assert (len(data.train), len(data.test) - defects, defects) == expected
    assert heard == []


def test_read__real_tiles(shared: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shared / "datasets/magnetic-tile/MT_Free").is_dir():
        pytest.skip("no magnetic tiles")
    monkeypatch.setenv("KD_YOLO_SHARED", str(shared))
    data = read_anomaly_data("tile")
    defects = Counter(sample.defect for sample in data.test if sample.label)
    assert defects == Counter(Blowhole=115, Break=85, Crack=57, Fray=32, Uneven=97)
    normal = sum(1 - sample.label for sample in data.test)
    assert len(data.train) + normal == 952
    assert 0.65 < len(data.train) / 952 < 0.72
    assert "4 have an empty mask; 2 more hold only regions under 10 pixels" in heard[0]
