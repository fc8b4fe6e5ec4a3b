from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from anomaly_factory import mvtec_tree, square_mask, write_photo, write_pixels
from torch.utils.data import DataLoader
from ultralytics.utils import LOGGER

from kd_yolo.anomaly.dataset import AnomalyDataset, collate, load_image, load_mask, stretched
from kd_yolo.anomaly.layouts import AnomalySample, read_anomaly_data
from kd_yolo.errors import ConfigError, DataError


@pytest.fixture
def samples(tmp_path: Path) -> list[AnomalySample]:
    return read_anomaly_data(mvtec_tree(tmp_path / "screw")).test


@pytest.mark.parametrize("cache", [True, False])
def test_dataset__items(samples: list[AnomalySample], cache: bool) -> None:
    data = AnomalyDataset(samples, 64, cache)
    assert len(data) == 6
    item = data[3]
    assert item["img"].shape == (3, 64, 64)
    assert item["img"].dtype == item["mask"].dtype == torch.uint8
    assert item["mask"].shape == (64, 64)
    assert set(item["mask"].unique().tolist()) == {0, 1}
    assert (item["label"], item["has_mask"], item["index"], item["defect"]) == (1, True, 3, "crack")
    assert item["im_file"] == str(samples[3].image)
    assert data[0]["mask"].sum() == 0
    assert data.labels().tolist() == [0, 0, 1, 1, 1, 1]
    assert data.masks().shape == (6, 64, 64)
    assert data.has_mask().all()


def test_dataset__cached_equals_uncached_and_is_not_shared(samples: list[AnomalySample]) -> None:
    cached, uncached = AnomalyDataset(samples, (48, 64), True), AnomalyDataset(samples, (48, 64), False)
    for index in range(len(samples)):
        assert torch.equal(cached[index]["img"], uncached[index]["img"])
        assert torch.equal(cached[index]["mask"], uncached[index]["mask"])
    cached[0]["img"].zero_()  # a batch that is changed in place must not change the cache
    assert torch.equal(cached[0]["img"], uncached[0]["img"])


def test_dataset__without_memory_it_reads_from_disk(
    samples: list[AnomalySample], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", said.append)
    full = type("Memory", (), {"available": 6 * 3 * 64 * 64})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: full)
    data = AnomalyDataset(samples, 64)
    assert data._images is None
    assert len(said) == 1
    assert "read from disk" in said[0]
    assert data[0]["img"].shape == (3, 64, 64)


def test_dataset__same_size_is_left_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = write_pixels(tmp_path / "a.png", pixels)
    found = load_image(file, (64, 64))
    assert np.array_equal(found, pixels[..., ::-1].transpose(2, 0, 1))  # RGB of what OpenCV wrote as BGR


def test_dataset__grey_images_become_three_equal_channels(tmp_path: Path) -> None:
    found = load_image(write_photo(tmp_path / "g.png", 0, (40, 40), grey=True), (64, 32))
    assert found.shape == (3, 64, 32)
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize("size", [(32, 32), (40, 64), (150, 100)])
def test_stretched__is_the_antialiased_bilinear_of_torch(size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (128, 96, 3), dtype=np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
    assert (torch.from_numpy(stretched(image, size)).permute(2, 0, 1)[None].float() - expected).abs().max() <= 1.01
    # the wrong twin: without antialiasing a shrunk texture keeps its noise
    plain = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    if size[0] < 100:
        assert plain.std() > stretched(image, size).std() + 5


def test_load_mask__keeps_values_and_drops_specks(tmp_path: Path) -> None:
    mask = square_mask((64, 64), side=16)
    mask[40, 40] = 255
    mask[50:60, 50:60] = 127  # not above the level
    file = write_pixels(tmp_path / "m.png", mask)
    sample = AnomalySample(tmp_path / "i.png", 1, "hole", file)
    assert load_mask(sample, (64, 64)).sum() == 257
    speckless = AnomalySample(tmp_path / "i.png", 1, "hole", file, min_area=10)
    assert load_mask(speckless, (64, 64)).sum() == 256
    half = load_mask(speckless, (32, 32))
    assert set(np.unique(half).tolist()) == {0, 1}
    assert half.sum() == 64  # nearest pixel: neither grown nor shrunk
    assert load_mask(AnomalySample(tmp_path / "i.png", 0, "good"), (8, 9)).shape == (8, 9)


def test_load_mask__colour_masks_count(tmp_path: Path) -> None:
    mask = np.zeros((20, 20, 3), np.uint8)
    mask[2:5, 2:5, 2] = 255  # red only
    sample = AnomalySample(tmp_path / "i.png", 1, "hole", write_pixels(tmp_path / "m.png", mask))
    assert load_mask(sample, (20, 20)).sum() == 9


def test_dataset__anomaly_without_mask(tmp_path: Path) -> None:
    sample = AnomalySample(write_photo(tmp_path / "a.png", 0), 1, "hole")
    item = AnomalyDataset([sample], 32)[0]
    assert (item["label"], item["has_mask"], int(item["mask"].sum())) == (1, False, 0)


@pytest.mark.parametrize("cache", [True, False])
def test_fail__truncated_image(samples: list[AnomalySample], cache: bool) -> None:
    file = samples[1].image
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=f"{file}.*replace the image or remove it"):
        AnomalyDataset(samples, 64, cache)[1]


def test_fail__settings(samples: list[AnomalySample]) -> None:
    with pytest.raises(ConfigError, match="imgsz=16"):
        AnomalyDataset(samples, 16)
    with pytest.raises(DataError, match="no images"):
        AnomalyDataset([], 64)


def test_collate__batches_through_a_loader(samples: list[AnomalySample]) -> None:
    batch = next(iter(DataLoader(AnomalyDataset(samples, 32), batch_size=4, collate_fn=collate)))
    assert batch["img"].shape == (4, 3, 32, 32)
    assert batch["mask"].shape == (4, 32, 32)
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert batch["has_mask"].dtype == torch.bool
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert len(batch["im_file"]) == len(batch["defect"]) == 4
