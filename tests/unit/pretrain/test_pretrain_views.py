from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kd_yolo.errors import ConfigError, DataError
from kd_yolo.images import textured_images
from kd_yolo.pretrain import views as module
from kd_yolo.pretrain.views import Views, find_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 12 images of several sizes, in two levels."""
    folder = tmp_path_factory.mktemp("views")
    (folder / "below").mkdir()
    for index, size in enumerate([(60, 90), (90, 60), (50, 50)] * 4):
        place = folder / "below" if index % 2 else folder
        cv2.imwrite(str(place / f"{index:02}.png"), textured_images(1, size, seed=index)[0])
    return folder


@pytest.fixture
def views(folder: Path) -> Views:
    return Views(find_images(str(folder)), 64, seed=5)


def test_batch__range_and_shape(views: Views) -> None:
    found = views.batch([0, 3, 11], 0)
    assert found.shape == (3, 3, 64, 64)
    assert found.dtype == torch.float32
    assert 0 <= float(found.min()) < float(found.max()) <= 1
    assert float(found.max()) > 0.1  # not divided twice


def test_batch__follows_from_seed_and_epoch(folder: Path, views: Views) -> None:
    files = find_images(str(folder))
    again = Views(files, 64, seed=5)
    again.batch([7, 1], 3)  # what was asked for before does not matter
    assert torch.equal(again.batch([2, 4], 1), views.batch([2, 4], 1))
    assert torch.equal(views.batch([4], 1), views.batch([2, 4], 1)[1:])  # nor its neighbours
    assert not torch.equal(views.batch([2, 4], 2), views.batch([2, 4], 1))
    assert not torch.equal(Views(files, 64, seed=6).batch([2, 4], 1), views.batch([2, 4], 1))


def test_batch__is_rgb(tmp_path: Path) -> None:
    red = np.zeros((40, 40, 3), np.uint8)
    red[..., 2] = 200  # OpenCV's order is blue, green, red
    cv2.imwrite(str(tmp_path / "red.png"), red)
    found = Views([tmp_path / "red.png"], 64).batch([0], 0)[0]
    assert float(found[0].min()) > 0.5
    assert float(found[1:].max()) == 0.0


def test_epoch__every_image_at_most_once(views: Views) -> None:
    batches = views.epoch(0, 5)
    assert [len(batch) for batch in batches] == [5, 5]
    assert len({number for batch in batches for number in batch}) == 10
    assert views.epoch(0, 5) == batches
    assert views.epoch(1, 5) != batches
    assert sorted(number for batch in views.epoch(0, 4) for number in batch) == list(range(12))


def test_epoch__fewer_images_than_a_batch(views: Views) -> None:
    (batch,) = views.epoch(0, 32)
    assert sorted(batch) == list(range(12))


def test_batch__images_beyond_the_memory_limit_are_read_again(
    folder: Path, views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = views.batch(list(range(12)), 0)
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 40_000)
    small = Views(find_images(str(folder)), 64, seed=5)
    for _ in range(2):
        assert torch.equal(small.batch(list(range(12)), 0), expected)
    assert 0 < len(small._kept) < 12


def test_find_images__a_folder_with_its_subfolders(folder: Path) -> None:
    assert [path.name for path in find_images(str(folder))] == [f"{i:02}.png" for i in (*range(0, 12, 2),)] + [
        f"{i:02}.png" for i in range(1, 12, 2)
    ]


def test_find_images__what_cannot_be_read_is_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "00.png").write_bytes((copy / "00.png").read_bytes()[:60])
    (copy / "empty.jpg").write_bytes(b"")
    (copy / "notes.txt").write_text("no image")
    (copy / "folder.png").mkdir()
    assert len(find_images(str(copy))) == 11
    assert any("3 of 14 images cannot be read" in record.getMessage() for record in caplog.records)


def test_find_images__of_a_data_set_only_training_images(tiny_data: Path) -> None:
    expected = sorted((tiny_data.parent / "images" / "train").iterdir())
    assert len(expected) == 24
    for given in (tiny_data, tiny_data.parent):
        assert [path.resolve() for path in find_images(str(given))] == [path.resolve() for path in expected]


def test_find_images__nothing_readable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images=.*no images in this folder"):
        find_images(str(tmp_path))
    for index in range(9):
        (tmp_path / f"{index}.jpg").write_text("no image")
    with pytest.raises(DataError, match="0 of 9 images can be read, at least 8 are needed"):
        find_images(str(tmp_path))


def test_find_images__neither_folder_nor_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images=.*nowhere: no folder of images, and no data set"):
        find_images(str(tmp_path / "nowhere"))
    (tmp_path / "bad.yaml").write_text("")
    with pytest.raises((ConfigError, DataError), match=r"images=.*bad\.yaml.*empty"):
        find_images(str(tmp_path / "bad.yaml"))
