"""The bundle's arithmetic against Ultralytics' own, number by number, and what a bundle holds."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
import torchvision
from detector_factory import save_checkpoint, tiny_detector
from kd_yolo.export import export
from kd_yolo.export.bundle import write_bundle
from numpy.typing import NDArray
from ultralytics.data.augment import LetterBox
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.files import sha256
from kd_yolo.images import textured_images, to_canvas

sys.path.insert(0, str(Path(write_bundle.__code__.co_filename).parent / "bundle_files"))  # as in a bundle's own folder
import detect
import detector

COPIED = Path(detect.__file__).parent

SIZES = [(1, 1), (1, 300), (480, 640), (127, 129), (200, 200), (33, 1000), (641, 639), (64, 64), (95, 31)]
CANVASES = [(64, 64), (224, 224), (96, 160), (640, 640)]


# ---- letterbox, input, boxes back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [3, 1])
def test_letterbox__equals_ultralytics(size: tuple[int, int], canvas: tuple[int, int], channels: int) -> None:
    image = np.random.default_rng(size).integers(0, 256, (*size, channels), np.uint8)
    expected = LetterBox(canvas, auto=False)(image=image.copy())
    np.testing.assert_array_equal(detector.letterbox(image, canvas), expected)


def test_letterbox__half_pixels_round_as_ultralytics() -> None:
    """Every size from 1 to 70 on an odd canvas: paddings of .0 and .5, scaled sides that end in .5."""
    for height in range(1, 71, 3):
        for width in range(1, 71):
            image = np.zeros((height, width, 3), np.uint8)
            params = LetterBox((57, 64), auto=False).get_params({"img": image})
            fitted = (*params["new_unpad"][::-1], params["top"], params["left"])
            assert detector.fit((height, width), (57, 64)) == fitted


def test_to_input__equals_the_predictor() -> None:
    images = textured_images(2, (90, 70), seed=5)
    pixels = detector.to_input(images, (64, 96), batch=2)
    np.testing.assert_array_equal(pixels, to_canvas(images, (64, 96)).numpy())
    assert pixels.flags.c_contiguous


def test_to_input__grey_and_padding_of_the_batch() -> None:
    image = textured_images(1, (64, 64), seed=5)[0][..., :1]
    pixels = detector.to_input([np.ascontiguousarray(image)], (64, 64), batch=3)
    assert pixels.shape == (3, 1, 64, 64)
    np.testing.assert_array_equal(pixels[0, 0], image[..., 0].astype(np.float32) / np.float32(255))
    assert not pixels[1:].any()


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("size", SIZES)
def test_to_image__equals_scale_boxes(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    rng = np.random.default_rng((*size, *canvas))
    rows = rng.uniform(-20, max(canvas) + 20, (50, 6)).astype(np.float32)  # some outside, to be clipped
    expected = scale_boxes(canvas, torch.from_numpy(rows[:, :4].copy()), size)
    found = detector.to_image(rows, canvas, size)
    # one multiplication by a reciprocal instead of a division: the last bits of a float32
    np.testing.assert_allclose(found[:, :4], expected.numpy(), rtol=3e-7, atol=1e-6)
    np.testing.assert_array_equal(found[:, 4:], rows[:, 4:])


# ---- NMS -------------------------------------------------------------------------------------------------------------


def random_output(seed: int, anchors: int, classes: int, crowd: float = 60.0, levels: int = 0) -> NDArray[np.float32]:
    """Return (4 + K, A) as a head says it; boxes crowd around few places, ``levels`` of scores make ties."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(50, 590, (2, max(anchors // 12, 1)))
    centre = places[:, rng.integers(0, places.shape[1], anchors)] + rng.normal(0, crowd / 10, (2, anchors))
    boxes = np.concatenate((centre, rng.uniform(crowd / 3, crowd, (2, anchors))))
    scores = rng.uniform(0, 1, (classes, anchors)) ** 3
    if levels:
        boxes, scores = boxes.round(), (scores * levels).round() / levels
    return np.concatenate((boxes, scores)).astype(np.float32)


def reference(output: NDArray[np.float32], limits: detector.Limits, **given: Any) -> NDArray[np.float32]:
    kept = non_max_suppression(
        torch.from_numpy(output.copy())[None],
        limits.confidence,
        limits.iou,
        classes=limits.classes,
        max_time_img=1e6,
        **given,
    )
    rows: NDArray[np.float32] = kept[0].numpy()
    return rows


@pytest.mark.parametrize("classes", [1, 6, 80])
@pytest.mark.parametrize("anchors", [1, 40, 1029, 8400])
@pytest.mark.parametrize("limits", [detector.Limits(), detector.Limits(0.05, 0.45), detector.Limits(0.6, 0.2, [0, 3])])
def test_select__equals_non_max_suppression(classes: int, anchors: int, limits: detector.Limits) -> None:
    output = random_output(anchors + classes, anchors, classes)
    found = detector.select(output, "nms", limits)
    np.testing.assert_array_equal(found, reference(output, limits))
    if anchors == 8400 and limits.confidence < 0.5:
        assert len(found) > 20, "the case says something"


@pytest.mark.parametrize("seed", range(4))
def test_select__equals_non_max_suppression_with_ties(seed: int) -> None:
    """Whole coordinates and few scores: many boxes tie, and many pairs overlap alike. Ties go by anchor."""
    output = random_output(seed, 1500, 3, levels=8)
    limits = detector.Limits(0.1, 0.5)
    found = detector.select(output, "nms", limits)
    assert len(np.unique(found[:, 4])) < len(found) / 2
    np.testing.assert_array_equal(found, reference(output, limits))


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 700, 3000])
@pytest.mark.parametrize("iou", [0.0, 0.3, 0.7, 1.0])
def test_nms__equals_torchvision(monkeypatch: pytest.MonkeyPatch, count: int, iou: float) -> None:
    monkeypatch.setattr(detector, "MAX_DETECTIONS", 100_000)
    rng = np.random.default_rng((count, int(10 * iou)))
    low = rng.integers(0, 300, (count, 2))
    boxes = np.concatenate((low, low + rng.integers(0, 60, (count, 2))), 1).astype(np.float32)  # some without an area
    scores = torch.linspace(1, 0.1, count)
    expected = torchvision.ops.nms(torch.from_numpy(boxes), scores, iou)
    assert detector.nms(boxes, iou) == expected.tolist()


def test_nms__stops_at_the_limit_with_the_best() -> None:
    output = random_output(9, 8400, 6, crowd=6.0)
    limits = detector.Limits(0.001, 0.9)
    found = detector.select(output, "nms", limits)
    assert len(found) == 300
    np.testing.assert_array_equal(found, reference(output, limits))


def test_select__more_candidates_than_nms_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "MAX_CANDIDATES", 150)
    output = random_output(2, 3000, 2)
    limits = detector.Limits(0.01, 0.7)
    np.testing.assert_array_equal(detector.select(output, "nms", limits), reference(output, limits, max_nms=150))
    assert len(reference(output, limits)) > len(reference(output, limits, max_nms=150)), "the cut matters here"


def test_select__a_score_at_the_threshold_is_no_detection() -> None:
    output = np.array([[10], [10], [4], [4], [0.5]], np.float32)
    assert len(detector.select(output, "nms", detector.Limits(0.5))) == 0
    assert len(detector.select(output, "nms", detector.Limits(0.49))) == 1


def test_select__boxes_of_two_classes_do_not_suppress_each_other() -> None:
    """The wrong twin of the offset: without it the weaker of two equal boxes of different classes is gone."""
    output = np.array([[10, 10], [10, 10], [4, 4], [4, 4], [0.9, 0.1], [0.1, 0.8]], np.float32)
    rows = detector.select(output, "nms", detector.Limits())
    assert rows[:, 5].tolist() == [0, 1]
    assert detector.nms(rows[:, :4], 0.7) == [0]


@pytest.mark.parametrize(("iou", "kept"), [(0.3, [0]), (0.7, [0, 1])])
def test_nms__overlap_of_the_threshold_itself(iou: float, kept: list[int]) -> None:
    """The overlap is a float32: 0.3 becomes more than the threshold's float64, 0.7 less. torchvision says the same."""
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10 * iou]], np.float32)
    assert detector.nms(boxes, iou) == kept
    assert torchvision.ops.nms(torch.from_numpy(boxes), torch.tensor([0.9, 0.8]), iou).tolist() == kept


@pytest.mark.parametrize("head", ["nms-free", "nms inside"])
@pytest.mark.parametrize("limits", [detector.Limits(), detector.Limits(0.9), detector.Limits(0.1, 0.7, [1, 2])])
def test_select__rows_are_only_filtered(head: str, limits: detector.Limits) -> None:
    rng = np.random.default_rng(3)
    rows = rng.uniform(0, 1, (320, 6)).astype(np.float32)
    rows = rows[np.argsort(-rows[:, 4])]
    rows[:, 5] = rng.integers(0, 4, 320)
    expected = non_max_suppression(torch.from_numpy(rows)[None], limits.confidence, classes=limits.classes)[0]
    np.testing.assert_array_equal(detector.select(rows, head, limits), expected.numpy())


# ---- what reading does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".bmp"])
@pytest.mark.parametrize("channels", [3, 1])
def test_read_file__as_ultralytics(tmp_path: Path, suffix: str, channels: int) -> None:
    from ultralytics.utils.patches import imread

    path = tmp_path / f"höhe{suffix}"
    cv2.imencode(suffix, textured_images(1, (40, 60), seed=1)[0])[1].tofile(path)
    expected = imread(path, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR)
    (frame,) = detect.read_frames(str(path), channels)
    np.testing.assert_array_equal(frame.pixels, expected)
    assert frame.pixels.shape == (40, 60, channels)


@pytest.mark.parametrize(("channels", "depth"), [(1, np.uint16), (3, np.uint16), (4, np.uint8)])
def test_read_file__depth_and_alpha_as_ultralytics(tmp_path: Path, channels: int, depth: type[Any]) -> None:
    from ultralytics.utils.patches import imread

    pixels = np.random.default_rng(0).integers(0, np.iinfo(depth).max, (30, 30, channels)).astype(depth)
    for suffix in (".png", ".tif"):
        path = tmp_path / f"deep{suffix}"
        cv2.imencode(suffix, pixels)[1].tofile(path)
        (frame,) = detect.read_frames(str(path), 3)
        expected = imread(path)
        assert expected is not None
        # Ultralytics cuts off the lower byte of 16-bit colors in TIFF files, OpenCV rounds: one grey level of 255
        apart = int(np.abs(frame.pixels.astype(int) - expected).max())
        assert apart <= (1 if suffix == ".tif" and channels == 3 else 0)


def test_formats__are_those_of_ultralytics() -> None:
    from ultralytics.data.utils import IMG_FORMATS, VID_FORMATS

    assert {f".{name}" for name in IMG_FORMATS} == detect.IMAGES
    assert {f".{name}" for name in VID_FORMATS} == detect.VIDEOS


# ---- the provider: taken or refused ----------------------------------------------------------------------------------


class FakeRuntime:
    """An ONNX Runtime that has what ``has`` names, of which only ``works`` starts; the rest falls back silently."""

    class SessionOptions:
        intra_op_num_threads = 0
        log_severity_level = 2

    def __init__(self, has: list[str], works: list[str], fails: str = "") -> None:
        self.has, self.works, self.fails = has, works, fails
        self.opened: list[tuple[str, dict[str, str]]] = []

    def get_available_providers(self) -> list[str]:
        return [detector.PROVIDERS[name] for name in self.has]

    def set_default_logger_severity(self, level: int) -> None:
        assert level == 4

    def InferenceSession(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        ((name, given),) = providers
        self.opened.append((name, given))
        if self.fails and name == detector.PROVIDERS[self.fails]:
            raise RuntimeError("no such device\nmore")
        real = name if name in {detector.PROVIDERS[word] for word in self.works} else "CPUExecutionProvider"
        return type("Session", (), {"get_providers": lambda self: [real]})()


@pytest.mark.parametrize(
    ("asked", "has", "works", "taken"),
    [
        ("auto", ["tensorrt", "cuda", "cpu"], ["tensorrt", "cuda", "cpu"], "cuda"),
        ("auto", ["tensorrt", "cuda", "cpu"], ["cpu"], "cpu"),
        ("auto", ["openvino", "cpu"], ["openvino", "cpu"], "openvino"),
        ("auto", ["cpu"], ["cpu"], "cpu"),
        ("tensorrt", ["tensorrt", "cuda", "cpu"], ["tensorrt", "cuda", "cpu"], "tensorrt"),
        ("cpu", ["cuda", "cpu"], ["cuda", "cpu"], "cpu"),
    ],
)
def test_open_session__takes(
    monkeypatch: pytest.MonkeyPatch, asked: str, has: list[str], works: list[str], taken: str
) -> None:
    runtime = FakeRuntime(has, works)
    monkeypatch.setattr(detector, "onnxruntime", runtime)
    session, name = detector.open_session(Path("here/model.onnx"), asked, 2)
    assert name == session.get_providers()[0] == detector.PROVIDERS[taken]
    cache = runtime.opened[-1][1].get("trt_engine_cache_path")
    assert cache == (str(Path("here/tensorrt_cache")) if taken == "tensorrt" else None)


@pytest.mark.parametrize(
    ("runtime", "says"),
    [
        (FakeRuntime(["cpu"], ["cpu"]), r"--provider cuda: this onnxruntime does not have it \(it has: cpu\)"),
        (FakeRuntime(["cuda", "cpu"], ["cpu"]), "--provider cuda: onnxruntime could not start it"),
        (FakeRuntime(["cuda", "cpu"], ["cuda", "cpu"], fails="cuda"), "cannot open .*: no such device; see README"),
    ],
)
def test_open_session__never_replaces_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime, says: str
) -> None:
    monkeypatch.setattr(detector, "onnxruntime", runtime)
    with pytest.raises(detector.InputError, match=says):
        detector.open_session(Path("model.onnx"), "cuda", 0)


# ---- cameras ---------------------------------------------------------------------------------------------------------


class FakeCamera:
    """A camera that shows two pictures and then is pulled out."""

    def __init__(self, source: int | str) -> None:
        assert source == 0
        self.left, self.released = 2, False

    def get(self, _: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, Any]:
        self.left -= 1
        return self.left >= 0, np.zeros((8, 8, 3), np.uint8)

    def release(self) -> None:
        self.released = True


def test_read_frames__camera_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FakeCamera] = []

    def opening(source: int | str) -> FakeCamera:
        opened.append(FakeCamera(source))
        return opened[-1]

    monkeypatch.setattr(cv2, "VideoCapture", opening)
    frames = detect.read_frames("0", 3)
    assert [(frame.name, frame.number, frame.fps) for frame in (next(frames), next(frames))] == [
        ("0", 1, 25.0),
        ("0", 2, 25.0),
    ]
    with pytest.raises(detector.InputError, match="--source 0: the camera stopped"):
        next(frames)
    assert opened[0].released


def test_read_frames__releases_the_camera_when_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    camera = FakeCamera(0)
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: camera)
    frames: Any = detect.read_frames("0", 1)
    assert next(frames).pixels.shape == (8, 8, 1)
    frames.close()
    assert camera.released


# ---- what a bundle holds ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = save_checkpoint(tiny_detector(), tmp_path_factory.mktemp("bundle") / "best.pt")
    path: Path = export(source, imgsz=[64, 96]).path
    return path


def test_write_bundle__files_and_metadata(onnx_file: Path, tmp_path: Path) -> None:
    written = write_bundle(onnx_file, tmp_path / "b")
    names = ["README.md", "detect.py", "detector.py", "labels.txt", "metadata.json", "model.onnx", "requirements.txt"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names
    about = json.loads((tmp_path / "b" / "metadata.json").read_text(encoding="utf-8"))
    own = json.loads(onnx.load(onnx_file).metadata_props[-1].value)
    expected = {
        "bundle": 1,
        "names": {"0": "scratch", "1": "dent", "2": "stain"},
        "canvas": [64, 96],
        "channels": 3,
        "stride": 32,
        "batch": 1,
        "dynamic": False,
        "precision": "fp32",
        "head": "nms",
        "confidence": 0.25,
        "iou": 0.7,
        "model_sha256": sha256(onnx_file),
        "source_sha256": own["source_sha256"],
        "recipe_sha256": own.get("recipe_sha256"),
    }
    assert {key: about[key] for key in expected} == expected
    assert set(about) - set(expected) == {"versions", "created"}
    assert {"kd_yolo", "ultralytics", "torch", "onnxruntime"} <= set(about["versions"])
    assert (tmp_path / "b" / "labels.txt").read_text(encoding="utf-8").splitlines() == ["scratch", "dent", "stain"]
    assert (tmp_path / "b" / "model.onnx").read_bytes() == onnx_file.read_bytes()


def test_write_bundle__readme_speaks_of_this_model(onnx_file: Path, tmp_path: Path) -> None:
    write_bundle(onnx_file, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "$" not in text
    assert "finds: scratch, dent, stain" in text
    assert "64x96 pixels" in text
    assert sha256(tmp_path / "model.onnx") in text


def test_readme__names_every_option() -> None:
    text = (COPIED / "README.md").read_text(encoding="utf-8")
    source = (COPIED / "detect.py").read_text(encoding="utf-8")
    options = set(re.findall(r'add_argument\(\s*"(--\w+)"', source))
    assert len(options) == 9
    assert set(re.findall(r"^\| `(--\w+)`", text, re.MULTILINE)) == options


def test_write_bundle__refuses_what_is_no_detector(tmp_path: Path, onnx_file: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"x\.onnx"):
        write_bundle(tmp_path / "x.onnx", tmp_path / "b")
    graph = onnx.load(onnx_file)
    for entry in graph.metadata_props:
        if entry.key == "channels":
            entry.value = "4"
    onnx.save(graph, tmp_path / "four.onnx")
    with pytest.raises((ConfigError, ModelError), match=r"four\.onnx"):
        write_bundle(tmp_path / "four.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_detect__stands_alone_on_python_3_9() -> None:
    """They import nothing but each other, the standard library and three packages, and parse as Python 3.9."""
    used = set()
    for name in ("detect.py", "detector.py"):
        tree = ast.parse((COPIED / name).read_text(encoding="utf-8"), feature_version=(3, 9))
        nodes = list(ast.walk(tree))
        used |= {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        used |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    standard = {"__future__", "argparse", "collections", "contextlib", "hashlib", "io", "itertools", "json"}
    assert used == standard | {"os", "pathlib", "sys", "time", "typing", "cv2", "numpy", "onnxruntime", "detector"}
    required = (COPIED / "requirements.txt").read_text(encoding="utf-8")
    assert re.findall(r"^[\w-]+", required, re.MULTILINE) == ["numpy", "opencv-python", "onnxruntime"]


def test_detector__python_use(onnx_file: Path, tmp_path: Path) -> None:
    """The line that the README shows."""
    write_bundle(onnx_file, tmp_path)
    model = detector.Detector(tmp_path, "cpu", threads=1)
    (rows,), spent = model.detect(textured_images(1, (90, 80), seed=3), detector.Limits())
    assert rows.shape[1] == 6
    assert len(rows) > 0
    assert set(spent) == {"pre", "infer", "post"}
