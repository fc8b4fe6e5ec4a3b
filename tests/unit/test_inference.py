from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detector_factory import tiny_detector
from ultralytics.utils.nms import non_max_suppression

from kd_yolo.errors import ConfigError, ReparamError
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.inference import (
    RawOutputs,
    check_canvas,
    count_convolutions,
    count_parameters,
    deployed_form,
    detections,
    head_of,
    raw_outputs,
    use_head,
    uses_nms,
)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return to_canvas(textured_images(4), (64, 96))


@pytest.mark.parametrize(("imgsz", "expected"), [(64, (64, 64)), ([64, 96], (64, 96)), ((32, 32), (32, 32))])
def test_check_canvas__good(imgsz: Any, expected: tuple[int, int]) -> None:
    assert check_canvas(imgsz, 32) == expected


@pytest.mark.parametrize(
    ("imgsz", "hint"),
    [
        (0, "for example 32"),
        (-64, "for example 32"),
        (100, "for example 128"),
        ([64, 65], r"for example \[64, 96\]"),
        ([64], "one whole number"),
        ([64, 64, 3], "one whole number"),
        (True, "one whole number"),
        ([64.0, 64], "one whole number"),
    ],
)
def test_check_canvas__bad(imgsz: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"imgsz=.*{hint}"):
        check_canvas(imgsz, 32)


def test_raw_outputs__are_what_the_model_returns(pixels: torch.Tensor) -> None:
    model = tiny_detector()
    use_head(model, nms=True)
    raw = raw_outputs(model, pixels)
    decoded = model(pixels)[0].detach()
    centre, size = decoded[:, :2], decoded[:, 2:4]
    corners = torch.cat((centre - size / 2, centre + size / 2), 1).transpose(1, 2)
    assert torch.equal(raw.scores, decoded[:, 4:].transpose(1, 2))
    torch.testing.assert_close(raw.boxes, corners)


@pytest.mark.parametrize("nms", [True, False])
def test_detections__equal_the_stock_selection(pixels: torch.Tensor, nms: bool) -> None:
    model = tiny_detector()
    use_head(model, nms)
    ours = detections(raw_outputs(model, pixels), nms)
    output = model(pixels)[0].detach()
    theirs = non_max_suppression(output, 0.25, 0.7, max_det=300, end2end=not nms)
    assert sum(map(len, ours)) > 20
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_difference__golden() -> None:
    # boxes differ by 0.5 in one of eight coordinates: largest 0.5, mean 0.5 / 8
    one = RawOutputs(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3))
    boxes, scores = torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)
    boxes[0, 1, 2], scores[0, 0, 1] = -0.5, 0.25
    found = one.difference(RawOutputs(boxes, scores))
    assert (found.box, found.box_mean, found.score) == (0.5, 0.0625, 0.25)


@pytest.mark.parametrize("nms", [True, False])
def test_deployed_form__is_the_plain_network(pixels: torch.Tensor, nms: bool) -> None:
    model, plain = tiny_detector(), tiny_detector(form=None)
    before = copy.deepcopy(model.state_dict())
    use_head(model, nms)
    deployed, report = deployed_form(model, nms)
    head_of(plain).end2end = not nms
    head_of(plain).fuse()
    assert report.checked
    assert count_parameters(deployed) == count_parameters(plain)
    assert count_convolutions(deployed) == count_convolutions(plain)
    assert uses_nms(deployed) is nms
    assert raw_outputs(model, pixels).difference(raw_outputs(deployed, pixels)).box < 1e-3
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(type(module).__module__.startswith("kd_yolo") for module in deployed.modules())
    assert deployed.yaml["end2end"] is not nms
    assert "kd_yolo" not in deployed.yaml


def test_deployed_form__wrong_merge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_yolo.nn.blocks import RepBlock

    right = RepBlock.to_conv

    def forgetful(block: RepBlock) -> Any:
        conv = right(block)
        conv.bn.bias.data.add_(0.01)
        return conv

    monkeypatch.setattr(RepBlock, "to_conv", forgetful)
    with pytest.raises(ReparamError):
        deployed_form(tiny_detector())


def test_use_head__missing_branches() -> None:
    with pytest.raises(ConfigError, match=r"a\.pt: has no NMS-free"):
        use_head(tiny_detector(both_heads=False), nms=False, name="a.pt")
    free, _ = deployed_form(tiny_detector(), nms=False)
    with pytest.raises(ConfigError, match=r"b\.pt: keeps only its NMS-free head"):
        use_head(free, nms=True, name="b.pt")
