"""The order of images without labels: fair, shared out, repeatable, and without a trace in other random streams."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from ultralytics.cfg import get_cfg

from kd_yolo.images import textured_images
from kd_yolo.tasks.unlabeled import image_files
from kd_yolo.tasks.unlabeled_stream import EpochShare, UnlabeledImages, UnlabeledStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 13 textured images, some nested."""
    root = tmp_path_factory.mktemp("unlabeled")
    for number, image in enumerate(textured_images(13, (64, 80))):
        place = root / "line 2" / "cam" if number % 3 == 0 else root
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{number}.png"), image)
    return root


@pytest.mark.parametrize(("size", "draws", "world"), [(10, 4, 1), (7, 5, 2), (3, 8, 2), (50, 6, 4)])
def test_epoch_share__every_image_once_before_any_twice(size: int, draws: int, world: int) -> None:
    shares = [EpochShare(size, draws, seed=4, rank=rank, world=world) for rank in range(world)]
    drawn: list[int] = []
    for epoch in range(6):
        for share in shares:
            share.epoch = epoch
        columns = [list(share) for share in shares]
        assert [len(column) for column in columns] == [draws] * world
        drawn += [index for row in zip(*columns, strict=True) for index in row]
    for start in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[start : start + size]) == list(range(size))
    laps = [tuple(drawn[start : start + size]) for start in range(0, len(drawn) - size + 1, size)]
    assert len(set(laps)) > 1 or len(laps) == 1  # shuffled anew
    assert list(EpochShare(size, draws, seed=5)) != list(EpochShare(size, draws, seed=4)) or size < 4


def stream_of(folder: Path, workers: int = 0, ratio: float = 0.5, batch: int = 8) -> UnlabeledStream:
    arguments = get_cfg(overrides={"imgsz": 64, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0})
    data = {"names": {0: "a"}, "channels": 3, "nc": 1}
    files = image_files(folder)
    dataset = UnlabeledImages(files, imgsz=64, augment=True, hyp=arguments, batch_size=batch, stride=32, data=data)
    return UnlabeledStream(dataset, ratio, batch, steps=3, workers=workers, seed=1)


def epoch_of(stream: UnlabeledStream, epoch: int, images: int = 8) -> Tensor:
    stream.begin_epoch(epoch)
    return torch.cat([stream.join(torch.zeros(images, 3, 64, 64)) for _ in range(3)])


def test_stream__an_epoch_depends_on_its_number_only(folder: Path) -> None:
    through = stream_of(folder)
    epochs = [epoch_of(through, epoch) for epoch in range(3)]
    assert not torch.equal(epochs[0], epochs[1])
    fresh = stream_of(folder)  # as after a resume
    random.random()
    torch.rand(3)
    assert torch.equal(epoch_of(fresh, 2), epochs[2])
    assert torch.equal(epoch_of(fresh, 1), epochs[1])


def test_stream__leaves_the_global_random_streams_alone(folder: Path) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    expected = drawn() + drawn()
    seed()
    stream = stream_of(folder)
    before = drawn()
    epoch_of(stream, 0)
    assert before + drawn() == expected


def test_stream__share_size_canvas_and_range(folder: Path) -> None:
    stream = stream_of(folder, ratio=0.5)
    stream.begin_epoch(0)
    whole = stream.join(torch.zeros(8, 3, 64, 64))
    assert whole.shape == (4, 3, 64, 64)
    assert whole.dtype == torch.float32
    assert 0 <= float(whole.min()) < float(whole.max()) <= 1
    assert stream.join(torch.zeros(5, 3, 96, 96)).shape == (2, 3, 96, 96)  # round(2.5), multi_scale
    assert stream.join(torch.zeros(1, 3, 64, 64)).shape[0] == 1  # never none
    assert stream_of(folder, ratio=2.0).share_of(8) == 16


def test_stream__closes_mosaic(folder: Path) -> None:
    """A mosaic has other pictures' edges in it; without it at most the grey border 114 is foreign."""
    stream = stream_of(folder)
    names = [type(step).__name__ for step in stream.dataset.transforms.transforms[0].transforms]
    assert "Mosaic" in names
    with_mosaic = epoch_of(stream, 0)
    stream.close_mosaic(get_cfg(overrides={"imgsz": 64}))
    assert stream.dataset.transforms.transforms[0].transforms[0].p == 0.0
    assert not torch.equal(epoch_of(stream, 0), with_mosaic)


def test_stream__worker_processes(folder: Path) -> None:
    stream = stream_of(folder, workers=1)
    first = epoch_of(stream, 0)
    assert first.shape == (12, 3, 64, 64)
    stream.close_mosaic(get_cfg(overrides={"imgsz": 64}))
    assert epoch_of(stream, 1).shape == first.shape
    stream.close()
    assert torch.equal(epoch_of(stream_of(folder, workers=1), 0), first)
