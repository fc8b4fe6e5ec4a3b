from __future__ import annotations

from typing import Any

import pytest
import torch
from anomaly_models import stir_norms, textures, tiny_model
from torch import nn

from kd_yolo.anomaly import merging
from kd_yolo.anomaly.backbones import build_backbone
from kd_yolo.anomaly.merging import deployed
from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.errors import ModelError, ReparamError
from kd_yolo.nn import reparam
from kd_yolo.nn.blocks import RepBlock


def stirred(**changes: Any) -> AnomalyModel:
    model = tiny_model(**changes).eval()
    stir_norms(model.student)
    stir_norms(model.projectors)
    for name, parameter in model.named_parameters():
        if "expand" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plus": True, "student": "lightnet-n"},
        {"same": 1.0, "maps": "both", "cbam": "block", "student": "lightnet-n"},
        {"cross": 0.0, "same": 1.0, "fuse": "product"},
        {"projector": "teacher-frozen"},
        {"projector": "teacher-anchored", "same": 1.0},
    ],
    ids=str,
)
def test_deployed__computes_the_same_maps_with_less(changes: dict[str, Any]) -> None:
    model = stirred(**changes)
    images = textures(2)
    model.fit_targets([images])
    calibration = model.calibrate([images])
    slim = deployed(model)
    with torch.no_grad():
        expected, found = model(images), slim(images)
    torch.testing.assert_close(found, expected, atol=2e-4 if changes.get("fuse") != "product" else 1e-3, rtol=1e-3)
    assert slim.calibration == calibration
    assert slim.is_deployed
    assert not model.is_deployed
    assert not any(isinstance(module, (nn.BatchNorm2d, RepBlock)) for module in slim.modules())
    assert not any(parameter.requires_grad for parameter in slim.parameters())
    assert list(slim.teacher.parameters()) == []
    assert all(isinstance(part, nn.Module) for part in slim.modules())
    assert sum(value.numel() for value in slim.state_dict().values()) < sum(
        value.numel() for value in model.state_dict().values()
    )


def test_deployed__drops_heads_that_only_training_uses() -> None:
    assert len(deployed(stirred(same=1.0)).anchors) == 0
    assert len(deployed(stirred(cross=0.5, same=1.0, maps="same")).projectors) == 0


def test_deployed__again_and_no_training() -> None:
    slim = deployed(stirred(taps=[16]))
    images = textures(1)
    with torch.no_grad():
        assert torch.equal(deployed(slim)(images), slim(images))
    with pytest.raises(ModelError, match="cannot be trained"):
        slim.loss(images)


def test_deployed__a_wrong_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reparam.fold_bn

    def wrong(kernel: Any, bias: Any, norm: nn.BatchNorm2d) -> Any:
        folded, shift = right(kernel, bias, norm)
        return folded, shift * 1.01

    model = stirred(taps=[16])
    monkeypatch.setattr(merging, "fold_bn", wrong)
    with pytest.raises(ReparamError, match="do not deploy it"):
        deployed(model)


def test_deployed__of_a_network_with_siblings_that_do_not_follow_each_other() -> None:
    """A densenet normalises before it convolves; its folded form must still be right or refused."""
    spec = tiny_model(taps=[8]).spec
    teacher = build_backbone("torchvision:densenet121", [8], allow_random=True)
    model = AnomalyModel(spec, teacher=teacher).eval()
    images = textures(1)
    with torch.no_grad():
        torch.testing.assert_close(deployed(model)(images), model(images), atol=1e-4, rtol=1e-3)
