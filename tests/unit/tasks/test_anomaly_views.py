"""How training images are varied."""

from __future__ import annotations

import torch

from kd_yolo.tasks.anomaly import Views


def test_views__nothing_asked_for_changes_nothing() -> None:
    images = torch.rand(4, 3, 8, 8)
    assert not Views().any
    assert Views().vary(images) is images


def test_views__flips_are_the_four_mirror_images() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8)
    mirrored = [image, image.flip(-1), image.flip(-2), image.flip(-1, -2)]
    seen = set()
    for found in Views(flips=True).vary(image.repeat(64, 1, 1, 1)):
        (which,) = [number for number, one in enumerate(mirrored) if torch.equal(found, one[0])]
        seen.add(which)
    assert seen == {0, 1, 2, 3}


def test_views__brightness_is_one_gain_an_image_within_bounds() -> None:
    torch.manual_seed(0)
    images = torch.full((256, 3, 4, 4), 0.5)
    found = Views(brightness=0.2).vary(images)
    gains = found / images
    assert torch.equal(gains, gains[:, :1, :1, :1].expand_as(gains))
    assert 0.8 <= float(gains.min()) < 0.82
    assert 1.18 < float(gains.max()) <= 1.2
    assert float(Views(brightness=0.9).vary(torch.ones(8, 3, 2, 2)).max()) == 1
