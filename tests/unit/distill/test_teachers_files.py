"""Every kind of teacher file beside a student: what it gives, what is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_factory import save_checkpoint, tiny_dataset, tiny_detector, tiny_yaml
from teacher_files import (
    DATA_NAMES,
    check_step,
    recipe_for,
    rtdetr_file,
    torchvision_file,
    wrapped,
    yolo_file,
)
from torch import Tensor
from torchvision.models.detection import fcos_resnet50_fpn

from kd_yolo.distill.teacher import map_classes
from kd_yolo.distill.teachers import choice as choice_module
from kd_yolo.distill.teachers.build import open_teacher, prepare_merge
from kd_yolo.distill.teachers.choice import choose
from kd_yolo.distill.teachers.onnx_file import OnnxTeacher, anchor_strides, check_dense
from kd_yolo.distill.teachers.torchvision_adapter import TorchvisionTeacher
from kd_yolo.errors import CheckpointError, ConfigError, KDYoloError, ModelError, TeacherError
from kd_yolo.resources import load_yaml

SCORES, ANSWERS = frozenset({"scores"}), frozenset({"scores", "boxes"})
EVERYTHING = frozenset({"neck", "scores", "boxes"})
FAMILIES = ["yolov5n.yaml", "yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml", "yolo26s.yaml", "lightnet-s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def fcos(folder: Path) -> Path:
    return torchvision_file(folder)


@pytest.fixture(scope="module")
def onnx_path(folder: Path) -> Path:
    """Return a dense ONNX file of the tiny detector: three levels, three classes, canvas and batch fixed."""
    pytest.importorskip("onnxruntime")
    return onnx_file(folder / "fixed")


def onnx_file(folder: Path, nms_free: bool = False, **keys: Any) -> Path:
    from ultralytics import YOLO

    checkpoint = save_checkpoint(tiny_detector(form=None, both_heads=nms_free), folder / "best.pt")
    return Path(YOLO(checkpoint).export(format="onnx", imgsz=64, verbose=False, **keys))


def noise(images: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(images, 3, height, width, generator=torch.Generator().manual_seed(3))


# ---- YOLO families, levels and classes ----


@pytest.mark.parametrize("family", FAMILIES)
def test_yolo__every_family_teaches(family: str, folder: Path) -> None:
    kd = wrapped(recipe_for(yolo_file(folder, family), method="kd-lightnet+score-l2"))
    assert kd.strides == [8, 16, 32]
    check_step(kd)


@pytest.mark.parametrize(
    ("teacher", "student", "strides"),
    [
        ("yolov8-p2.yaml", "lightnet-n", [8, 16, 32]),
        ("lightnet-n", "yolo26-p2.yaml", [8, 16, 32]),
        ("yolov8-p2.yaml", "yolo26-p2.yaml", [4, 8, 16, 32]),
        ("yolov8-p6.yaml", "lightnet-n", [8, 16, 32]),
    ],
)
def test_yolo__levels_match_by_stride(teacher: str, student: str, strides: list[int], folder: Path) -> None:
    kd = wrapped(recipe_for(yolo_file(folder, teacher), method="score-l2"), student)
    assert kd.strides == strides
    check_step(kd)


def test_yolo__other_classes_are_masked(folder: Path) -> None:
    path = yolo_file(folder, "yolo11n.yaml", ["hole", "Dent", "rust", "scratch"])
    kd = wrapped(recipe_for(path))
    teacher = kd.teacher_model
    assert teacher is not None
    assert teacher.class_known is not None
    assert teacher.class_known.tolist() == [True, True, False]
    check_step(kd)


def test_open__no_common_level_is_refused(folder: Path) -> None:
    shallow = {**tiny_yaml(None), "head": [[[1], 1, "Detect", ["nc"]]]}
    with pytest.raises(TeacherError, match="no common feature level") as caught:
        wrapped(recipe_for(yolo_file(folder, shallow)))
    assert "\n" not in str(caught.value)


def test_build__a_changed_file_is_refused(folder: Path) -> None:
    path = yolo_file(folder / "changing", "lightnet-n")
    recipe = recipe_for(path)
    save_checkpoint(tiny_detector(), path)
    with pytest.raises(TeacherError, match="changed since this run began"):
        wrapped(recipe)


# ---- RT-DETR ----


def test_rtdetr__teaches(folder: Path) -> None:
    kd = wrapped(recipe_for(rtdetr_file(folder, ["stain", "hole", "scratch"]), method="kd-lightnet+score-l2"))
    teacher = kd.teacher_model
    assert teacher is not None
    assert teacher.title == "an RT-DETR detector"
    assert teacher.class_known is not None
    assert teacher.class_known.tolist() == [True, False, True]
    check_step(kd)


def test_rtdetr__its_own_best_box_stands_at_its_anchors(folder: Path) -> None:
    found = open_teacher(rtdetr_file(folder))
    teacher: Any = found.make(map_classes(DATA_NAMES, found.names))
    images = noise(1)
    with torch.no_grad():
        own = teacher.model.eval()(images)[0][0]  # rows of cx cy w h score class, 0..1, the best first
        output = teacher.predict(images)[0].T
    rows = own[own[:, 4].argsort(descending=True)]
    dense = output[:, 4:].amax(1)
    best = output[dense.argmax()]
    assert float(dense.max()) <= float(rows[0, 4]) + 1e-5
    same = ((rows[:, :4] * 64 - best[:4]).abs().amax(1) < 1e-2) & ((rows[:, 4] - dense.max()).abs() < 1e-4)
    assert bool(same.any())


def test_rtdetr__the_decoder_does_not_run_for_neck_maps_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_teacher(rtdetr_file(folder))
    teacher: Any = found.make(map_classes(DATA_NAMES, found.names))
    monkeypatch.setattr(teacher.model.model[-1], "forward", None)
    taps = teacher.taps(noise(), frozenset({"neck"}), (8, 32))
    assert [x.shape[-1] for x in taps.neck] == [8, 2]
    assert taps.scores.shape[1] == 0


# ---- torchvision ----


def test_fcos__teaches(fcos: Path) -> None:
    kd = wrapped(recipe_for(fcos, method="kd-lightnet+score-l2"))
    assert kd.strides == [8, 16, 32]
    check_step(kd)


def test_retinanet__teaches(tmp_path: Path) -> None:
    check_step(wrapped(recipe_for(torchvision_file(tmp_path, "retinanet_resnet50_fpn"))))


def test_fcos__says_what_torchvision_says(fcos: Path) -> None:
    torch.manual_seed(0)
    # min_size = max_size = canvas: torchvision's own resizing leaves the image as it is
    model: Any = fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, score_thresh=0.0, nms_thresh=1.0
    ).eval()
    teacher = TorchvisionTeacher(model, map_classes({0: "a", 1: "b", 2: "c"}, {0: "a", 1: "b", 2: "c"}))
    images = noise(2)
    with torch.no_grad():
        theirs, ours = model(list(images)), teacher.predict(images)
    for one, dense in zip(theirs, ours, strict=True):
        rows = dense.T
        corners = torch.cat((rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2), 1).clamp(0, 64)
        for box, score, label in zip(one["boxes"][:20], one["scores"][:20], one["labels"][:20], strict=True):
            match = (corners - box).abs().amax(1) < 1e-2
            assert bool(match.any())
            assert float((rows[match, 4 + label] - score).abs().min()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["scratch", "dent", "stain", "hole", "rust"]}, "names classes outside 0 to 3"),
        ({"num_classes": 4}, "weights do not fit"),
        ({"torchvision": "fcos_resnet50"}, "did you mean 'fcos_resnet50_fpn'"),
        ({"state_dict": None}, "'state_dict' is missing"),
        ({"num_classes": "4"}, "'num_classes' is missing or of another type"),
    ],
)
def test_torchvision__bad_contents(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {"torchvision": "fcos_resnet50_fpn", "num_classes": 4, "names": {1: "dent"}, "state_dict": {}} | changes
    path = tmp_path / "fcos.pt"
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    with pytest.raises(TeacherError, match=message) as caught:
        open_teacher(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


# ---- ONNX ----


def test_onnx__teaches_scores_alone(onnx_path: Path) -> None:
    recipe = recipe_for(onnx_path, args={"box_weight": 0.0})
    kd = wrapped(recipe, tiny_yaml(None, both_heads=False))
    assert list(check_step(kd)) == ["kd_cls_loss"]


@pytest.mark.parametrize("images", [1, 2, 5])
def test_onnx__equals_the_checkpoint_it_was_made_from(onnx_path: Path, images: int) -> None:
    names = {0: "stain", 1: "hole", 2: "scratch"}
    answers = []
    for path in (onnx_path, onnx_path.with_suffix(".pt")):
        found = open_teacher(path)
        teacher = found.make(map_classes(names, found.names))
        with torch.no_grad():
            answers.append(teacher.taps(noise(images), SCORES, (8, 32)))
    mine, theirs = answers
    known = torch.tensor([True, False, True])
    assert mine.scores.shape == theirs.scores.shape == (images, 3, 64 + 4)
    assert torch.equal(mine.anchors, theirs.anchors)
    within = theirs.scores[:, known].abs() < 10  # beyond that a float32 sigmoid has no digits left
    assert float((mine.scores - theirs.scores)[:, known][within].abs().max()) < 1e-2
    assert bool(torch.isfinite(mine.scores).all())


def test_onnx__free_batch_and_canvas(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = open_teacher(onnx_file(tmp_path, dynamic=True))
    assert found.canvas is None
    teacher = found.make(map_classes(DATA_NAMES, found.names))
    taps = teacher.taps(noise(3, 96, 64), SCORES, (8, 16, 32))
    assert taps.scores.shape == (3, 3, 12 * 8 + 6 * 4 + 3 * 2)


def test_onnx__raw_logits_are_taken_as_they_are(onnx_path: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_path)
    [node] = [n for n in model.graph.node if n.op_type == "Sigmoid" and _feeds_output(model, n)]
    node.op_type = "Identity"
    path = tmp_path / "logits.onnx"
    onnx.save(model, path)
    raw, plain = (open_teacher(p).make(map_classes(DATA_NAMES, DATA_NAMES)) for p in (path, onnx_path))
    assert isinstance(raw, OnnxTeacher)
    assert raw.raw_logits
    assert not plain.raw_logits
    first, second = (t.taps(noise(), SCORES, (8, 16, 32)).scores for t in (raw, plain))
    within = first.abs() < 10
    assert float((first - second)[within].abs().max()) < 1e-2
    assert torch.allclose(raw.predict(noise()), plain.predict(noise()), atol=1e-4)


def _feeds_output(model: Any, node: Any) -> bool:
    """Return whether a node's output is joined into the graph's output."""
    [join] = [n for n in model.graph.node if model.graph.output[0].name in n.output]
    return node.output[0] in join.input


def test_onnx__copies_open_the_file_again(onnx_path: Path) -> None:
    found = open_teacher(onnx_path)
    teacher = found.make(map_classes(DATA_NAMES, found.names))
    expected = teacher.taps(noise(), SCORES, (8,)).scores
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(twin.taps(noise(), SCORES, (8,)).scores, expected)


@pytest.mark.parametrize(("nms_free", "keys"), [(True, {"nms": False}), (False, {"nms": True})])
def test_onnx__selected_boxes_are_refused(nms_free: bool, keys: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = onnx_file(tmp_path, nms_free=nms_free, **keys)
    with pytest.raises(TeacherError, match=r"selected boxes.*export the teacher again.*nms_free=false") as caught:
        open_teacher(path)
    assert "\n" not in str(caught.value)


def test_onnx__grey_images_and_unknown_levels_are_refused(onnx_path: Path) -> None:
    from kd_yolo.runtimes import describe

    description = describe(onnx_path)
    with pytest.raises(TeacherError, match="1 channels; 3 are needed"):
        check_dense(onnx_path, replace(description, channels=1))
    assert anchor_strides(84, (64, 64), 32, "x") == (8, 16, 32)
    assert anchor_strides(84 + 256, (64, 64), 32, "x") == (4, 8, 16, 32)
    assert anchor_strides(4, (64, 64), 32, "x") == (32,)
    assert anchor_strides(85, (64, 64), 64, "x") == (8, 16, 32, 64)
    with pytest.raises(TeacherError, match="fit no levels"):
        anchor_strides(83, (64, 64), 32, "x")


def test_onnx__another_canvas_than_the_files(onnx_path: Path) -> None:
    found = open_teacher(onnx_path)
    assert found.canvas == (64, 64)
    teacher = found.make(map_classes(DATA_NAMES, found.names))
    with pytest.raises(KDYoloError, match="canvas is 64x64, not 96x96"):
        teacher.taps(noise(1, 96, 96), SCORES, (8,))


# ---- several ----


def test_several__of_different_kinds_teach(folder: Path) -> None:
    paths = yolo_file(folder, "yolov8-p2.yaml"), rtdetr_file(folder, ["dent", "scratch"])
    kd = wrapped(recipe_for(*paths))
    assert kd.strides == [8, 16, 32]
    check_step(kd)


def test_several__per_class_is_measured_once_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, own = tiny_dataset(tmp_path / "data"), tiny_yaml(None)
    recipe_file, kept = tmp_path / "student.recipe.yaml", tmp_path / "student.recipe.classes.json"
    paths = yolo_file(folder, own), yolo_file(folder, own, ["dent", "hole"], seed=1)
    recipe = recipe_for(*paths, teacher_merge="per_class")
    run = {"data": str(data), "imgsz": 64, "distill_model": str(recipe_file)}
    monkeypatch.setattr(choice_module, "RANK", 0)
    with pytest.raises(ConfigError, match="start multi-GPU runs with kd-yolo train"):
        wrapped(recipe, own, **run)  # a process of several measures nothing ...
    monkeypatch.undo()
    prepare_merge(recipe, recipe_file, DATA_NAMES, data, 64)
    found, stamp = load_yaml(kept), kept.stat().st_mtime_ns
    assert found["ap50_95"][1][0] is None  # scratch: the second teacher lacks it
    assert found["choice"] == choose(found["ap50_95"])
    monkeypatch.setattr(choice_module, "RANK", 0)
    check_step(wrapped(recipe, own, **run))  # ... and reads what was measured before
    monkeypatch.undo()
    assert kept.stat().st_mtime_ns == stamp
    check_step(wrapped(recipe, own, **{**run, "imgsz": 96}), imgsz=96)
    assert kept.stat().st_mtime_ns != stamp  # and again where it may differ
    with pytest.raises(ConfigError, match="needs data="):
        wrapped(recipe, own)


def test_several__with_an_onnx_file_give_scores_alone(onnx_path: Path, folder: Path) -> None:
    paths = onnx_path, yolo_file(folder, "yolo11n.yaml")
    with pytest.raises(TeacherError, match=r"reads the teacher's boxes, which several teachers"):
        wrapped(recipe_for(*paths))
    check_step(wrapped(recipe_for(*paths, args={"box_weight": 0.0})))


# ---- files ----


def test_open__what_is_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_teacher(tmp_path / "gone.pt")
    with pytest.raises(ModelError, match="no such file"):
        open_teacher(tmp_path / "gone.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("no protocol buffer")
    with pytest.raises(ModelError, match="not an ONNX file"):
        open_teacher(text)
