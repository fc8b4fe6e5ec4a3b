"""``predict`` and ``val`` take every exported format and say what the checkpoint says."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from ultralytics import YOLO
from ultralytics.engine.results import Results
from ultralytics.utils.metrics import box_iou

from kd_yolo import KDYOLO, commands
from kd_yolo.checkpoints import load_model, serialize
from kd_yolo.images import read_image, to_canvas
from kd_yolo.inference import deployed_form, head_of, raw_outputs
from kd_yolo.runtimes.ultralytics_backend import ExportedDetector

FORMATS = ["onnx", "openvino", "torchscript", "ncnn"]
NEEDS = {"onnx": ["onnxruntime"], "openvino": ["openvino"], "torchscript": [], "ncnn": ["ncnn", "pnnx"]}
QUIET: dict[str, Any] = {"device": "cpu", "verbose": False}

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoints(tiny_teacher: Path, images: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return deployed checkpoints with the NMS head (True) and the NMS-free one (False).

    One epoch leaves all scores near zero; a scaled last layer spreads them, so that one anchor in twenty answers.
    """
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    pixels = to_canvas([read_image(Path(image)) for image in images], (64, 64))
    for nms in (True, False):
        source, content = load_model(tiny_teacher)
        model, _ = deployed_form(source, nms)
        head = head_of(model)
        last = [level[-1] for level in (head.cv3 if nms else head.one2one_cv3)]
        for layer in last:
            layer.bias.fill_(0.0)
        logits = raw_outputs(model, pixels).scores.logit()
        scale = 2 / logits.std()
        for layer in last:
            layer.weight.mul_(scale)
            layer.bias.fill_(-1.0 - float(scale * logits.amax(-1).quantile(0.95)))
        found[nms] = folder / ("nms.pt" if nms else "free.pt")
        found[nms].write_bytes(serialize(model, content, {}))
    return found


@pytest.fixture(scope="module")
def exported(checkpoints: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function that exports with Ultralytics alone, once for the same keys, or skips."""
    made: dict[str, Path] = {}

    def export(format: str, free: bool = False, **keys: Any) -> Path:
        for package in NEEDS[format]:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
        key = repr((format, free, sorted(keys.items())))
        if key not in made:
            source = tmp_path_factory.mktemp("exported") / "best.pt"
            shutil.copy(checkpoints[not free], source)
            model = YOLO(source)
            made[key] = Path(model.export(**{"format": format, "imgsz": 64, "nms": False if free else None, **keys}))
        return made[key]

    return export


@pytest.fixture(scope="module")
def images(tiny_data: Path) -> list[str]:
    return [str(path) for path in sorted((tiny_data.parent / "images" / "val").iterdir())]


@pytest.fixture(scope="module")
def judged(checkpoints: dict[bool, Path], images: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data YAML whose labels are two thirds of what the checkpoint detects, slightly moved.

    So mAP is neither 0 nor 1, and one lost or displaced box changes it.
    """
    folder = tmp_path_factory.mktemp("judged")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    rng = np.random.default_rng(0)
    for image, result in zip(images, predict(checkpoints[True], images, imgsz=64), strict=True):
        shutil.copy(image, folder / "images")
        rows = []
        for index, (label, box) in enumerate(zip(result.boxes.cls.tolist(), result.boxes.xywhn.tolist(), strict=True)):
            if index % 3:
                moved = np.clip(np.array(box) + rng.normal(0, 0.02, 4), 0.01, 0.99)
                rows.append(" ".join([str(int(label)), *(f"{value:.5f}" for value in moved)]))
        (folder / "labels" / f"{Path(image).stem}.txt").write_text("\n".join(rows))
    names = KDYOLO(checkpoints[True]).names
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(folder), "train": "images", "val": "images", "names": names}))
    return path


def predict(path: Path, images: list[str], **keys: Any) -> list[Results]:
    found: list[Results] = KDYOLO(path).predict(images, **{**QUIET, **keys})
    return found


def validate(path: Path, data: Path, folder: Path, **keys: Any) -> tuple[float, float]:
    metrics = KDYOLO(path).val(data=str(data), workers=0, project=str(folder), name="val", **{**QUIET, **keys})
    return float(metrics.box.map50), float(metrics.box.map)


def check_same(ours: list[Results], theirs: list[Results], scores: float = 1e-3) -> None:
    """Every box has its counterpart: IoU >= 0.99, same label, same score."""
    assert sum(len(one.boxes) for one in theirs) >= 2 * len(theirs), "hardly anything to compare"
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.path == yours.path
        assert mine.names == yours.names
        assert len(mine.boxes) == len(yours.boxes)
        if not len(mine.boxes):
            continue
        same = mine.boxes.cls[:, None] == yours.boxes.cls[None]
        overlap = box_iou(mine.boxes.xyxy, yours.boxes.xyxy) * same
        difference = (mine.boxes.conf[:, None] - yours.boxes.conf[None]).abs()
        # Boxes that the image's border cuts may be equal: their scores decide which is which.
        likeness, left = overlap - difference, set(range(len(yours.boxes)))
        for row in range(len(mine.boxes)):
            column = max(left, key=lambda index: float(likeness[row, index]))
            left.remove(column)
            assert float(overlap[row, column]) >= 0.99
            assert float(difference[row, column]) <= scores


def test_check_same__sees_what_it_must(checkpoints: dict[bool, Path], images: list[str]) -> None:
    """The comparison that all tests below rest on refuses a moved box, another label, another score, a lost box."""
    right = predict(checkpoints[True], images, imgsz=64)
    check_same(right, right)
    for column, value in ((0, 3.0), (5, 1.0), (4, 0.01), (None, 0.0)):
        wrong = predict(checkpoints[True], images, imgsz=64)
        result = max(wrong, key=lambda one: len(one.boxes))
        rows = result.boxes.data.clone()
        if column is None:
            rows = rows[1:]
        else:
            rows[0, column] += value
        result.update(boxes=rows)
        with pytest.raises(AssertionError):
            check_same(wrong, right)


@pytest.mark.parametrize("format", FORMATS)
def test_predict__as_the_checkpoint(
    format: str, exported: Export, checkpoints: dict[bool, Path], images: list[str]
) -> None:
    """The canvas is the file's own; images go through a batch of one in portions."""
    model = KDYOLO(exported(format))
    assert isinstance(model.model, ExportedDetector)
    assert model.names == KDYOLO(checkpoints[True]).names
    theirs = predict(checkpoints[True], images, imgsz=64)
    check_same(model.predict(images, batch=4, **QUIET), theirs)
    check_same(list(model.predict(images, stream=True, **QUIET)), theirs)
    check_same(model(images, **QUIET), theirs)


@pytest.mark.parametrize("format", FORMATS)
def test_val__as_the_checkpoint(
    format: str, exported: Export, checkpoints: dict[bool, Path], judged: Path, tmp_path: Path
) -> None:
    expected = validate(checkpoints[True], judged, tmp_path, imgsz=64)
    assert 0.2 < expected[1] < 0.98
    assert validate(exported(format), judged, tmp_path, batch=3) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("format", ["onnx", "openvino", "torchscript"])
def test_nms_free__as_the_checkpoint(
    format: str, exported: Export, checkpoints: dict[bool, Path], images: list[str], judged: Path, tmp_path: Path
) -> None:
    path = exported(format, free=True)
    check_same(predict(path, images), predict(checkpoints[False], images, imgsz=64, nms=False))
    expected = validate(checkpoints[False], judged, tmp_path, imgsz=64, nms=False)
    assert expected[0] > 0.05
    assert validate(path, judged, tmp_path) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("keys", [{}, {"dynamic": True, "batch": 2}], ids=["fixed", "dynamic"])
def test_nms_inside__as_the_checkpoint(
    exported: Export,
    checkpoints: dict[bool, Path],
    images: list[str],
    judged: Path,
    tmp_path: Path,
    keys: dict[str, Any],
) -> None:
    """The file holds Ultralytics' thresholds of predict: val sees fewer weak boxes than a checkpoint gives it.

    Its NMS is unrolled over the batch it was exported with: a dynamic one leaves the images beyond that empty.
    """
    path = exported("onnx", nms=True, **keys)
    check_same(predict(path, images, batch=3), predict(checkpoints[True], images, imgsz=64))
    assert validate(path, judged, tmp_path)[1] > 0.2


def test_dynamic__any_canvas_and_batch(
    exported: Export, checkpoints: dict[bool, Path], images: list[str], judged: Path, tmp_path: Path
) -> None:
    model = KDYOLO(exported("onnx", dynamic=True))
    for imgsz in (64, 96, [64, 96]):
        theirs = predict(checkpoints[True], images, imgsz=imgsz)
        check_same(model.predict(images, imgsz=imgsz, batch=3, **QUIET), theirs)
    wide = cv2.resize(cv2.imread(images[0]), (200, 90))
    ours, theirs = (one.predict([wide], imgsz=96, rect=True, **QUIET) for one in (model, KDYOLO(checkpoints[True])))
    check_same(ours, theirs)
    expected = validate(checkpoints[True], judged, tmp_path, imgsz=96)
    assert validate(Path(str(model.model_name)), judged, tmp_path, imgsz=96) == pytest.approx(expected, abs=1e-3)


def test_rectangular_canvas(
    exported: Export, checkpoints: dict[bool, Path], images: list[str], judged: Path, tmp_path: Path
) -> None:
    """Val letterboxes the same images onto 64 x 96; the boxes are those of predict on the same canvas."""
    path = exported("onnx", imgsz=[64, 96])
    check_same(predict(path, images), predict(checkpoints[True], images, imgsz=[64, 96]))
    seen: list[tuple[int, ...]] = []
    model = KDYOLO(path)
    model.add_callback("on_val_batch_start", lambda validator: seen.append(tuple(validator.args.imgsz)))
    metrics = model.val(data=str(judged), workers=0, project=str(tmp_path), **QUIET)
    assert set(seen) == {(64, 96)}
    assert float(metrics.box.map) > 0.1


def test_fixed_batch__portions(exported: Export, checkpoints: dict[bool, Path], images: list[str]) -> None:
    check_same(predict(exported("onnx", batch=3), images, batch=8), predict(checkpoints[True], images, imgsz=64))


def test_one_model__for_many_calls(exported: Export, images: list[str], judged: Path, tmp_path: Path) -> None:
    """The session is opened once for the same canvas and device, and again for another."""
    model = KDYOLO(exported("onnx", dynamic=True))
    sessions = [model.model.session]
    for imgsz in (None, 64, 96):
        model.predict(images[:1], imgsz=imgsz, **QUIET)
        sessions.append(model.model.session)
        model.val(data=str(judged), imgsz=imgsz, workers=0, project=str(tmp_path), **QUIET)
        sessions.append(model.model.session)
    assert sessions[0] is None, "nothing is opened before it is used"
    assert len({id(session) for session in sessions[1:5]}) == len({id(session) for session in sessions[5:]}) == 1
    assert [session.canvas for session in sessions[4:6]] == [(64, 64), (96, 96)]


@pytest.mark.parametrize("format", FORMATS)
def test_commands__predict_and_val(
    format: str, exported: Export, checkpoints: dict[bool, Path], images: list[str], judged: Path, tmp_path: Path
) -> None:
    found = {}
    for path in (checkpoints[True], exported(format)):
        keys = {"model": str(path), "imgsz": 64, "project": str(tmp_path), "verbose": False}
        _, content = commands.predict({**keys, "source": str(judged.parent / "images"), "save": False})
        _, metrics = commands.val({**keys, "data": str(judged), "workers": 0})
        found[path] = content["images"], metrics
    (boxes, metrics), (our_boxes, our_metrics) = found.values()
    assert [one["image"] for one in our_boxes] == [one["image"] for one in boxes]
    assert [len(one["detections"]) for one in our_boxes] == [len(one["detections"]) for one in boxes]
    for key in ("metrics/mAP50(B)", "metrics/mAP50-95(B)"):
        assert our_metrics[key] == pytest.approx(metrics[key], abs=1e-3)
