from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ultralytics.data.augment import LetterBox
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

from kd_yolo.images import Image, to_bytes, to_canvas
from kd_yolo.inference import CONFIDENCE, MAX_DETECTIONS, NMS_IOU, postprocess

sides = st.integers(1, 90)


def stock_pixels(images: list[Image], canvas: tuple[int, int]) -> torch.Tensor:
    """Pre-process as ``ultralytics.engine.predictor.BasePredictor.preprocess`` does."""
    batch = np.stack([LetterBox(canvas, auto=False)(image=image) for image in images])
    pixels = torch.from_numpy(np.ascontiguousarray(batch[..., ::-1].transpose((0, 3, 1, 2)))).float()
    pixels /= 255
    return pixels


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.sampled_from([(64, 64), (32, 96), (96, 32)]))
def test_to_canvas__bit_equal_to_the_stock_predictor(shapes: list[tuple[int, int]], canvas: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(map(sum, shapes)))
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    expected = stock_pixels(images, canvas)
    found = to_canvas(images, canvas)
    assert found.is_contiguous()
    assert torch.equal(found, expected)
    assert torch.equal(to_bytes(images, canvas).float() / 255, expected)


def test_to_canvas__images_do_not_share_memory_with_the_batch() -> None:
    image = np.full((32, 32, 3), 9, np.uint8)
    pixels = to_bytes([image, image], (32, 32))
    pixels[0] = 0
    assert (image == 9).all()
    assert (pixels[1] == 9).all()


def raw_output(seed: int, batch: int, classes: int, anchors: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    output = torch.rand(batch, 4 + classes, anchors, generator=generator)
    output[:, :2] *= side
    output[:, 2:4] *= side / 3
    output[:, 4:] **= 4  # most anchors below the threshold, as in life
    return output


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 200), st.tuples(sides, sides))
def test_postprocess__bit_equal_to_the_stock_predictor(
    seed: int, batch: int, classes: int, anchors: int, shape: tuple[int, int]
) -> None:
    output = raw_output(seed, batch, classes, anchors, 64)
    expected = non_max_suppression(output.clone(), CONFIDENCE, NMS_IOU, max_det=MAX_DETECTIONS, max_time_img=1e6)
    for rows in expected:
        rows[:, :4] = scale_boxes((64, 64), rows[:, :4], shape)
    found = postprocess(output, [shape] * batch, (64, 64), nms=True)
    assert len(found) == len(expected) == batch
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_postprocess__rows_that_need_no_nms() -> None:
    rows = torch.tensor([[[0.0, 16, 32, 48, 0.9, 1], [4, 20, 36, 52, 0.8, 1], [0, 0, 9, 9, 0.2, 0]]])
    # a 128x256 image on 64x64: gain 0.25, 16 rows of padding above; the overlapping second row stays, the weak one goes
    found = postprocess(rows, [(128, 256)], (64, 64), nms=False)[0]
    expected = torch.tensor([[0.0, 0, 128, 128, 0.9, 1], [16, 16, 144, 128, 0.8, 1]])
    torch.testing.assert_close(found, expected)


def test_postprocess__uses_the_compiled_nms() -> None:
    """In Python it takes ten times as long; Ultralytics takes torchvision's kernel only where it is loaded."""
    code = "import sys, torch; from kd_yolo.inference import postprocess; before = 'torchvision' in sys.modules; "
    code += "postprocess(torch.zeros(1, 7, 2), [(10, 10)], (64, 64), nms=True); "
    code += "print(not before and 'torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("count", [0, 1])
def test_postprocess__nothing_found(count: int) -> None:
    output = torch.zeros(1, 7, count)
    assert postprocess(output, [(10, 10)], (64, 64), nms=True)[0].shape == (0, 6)
