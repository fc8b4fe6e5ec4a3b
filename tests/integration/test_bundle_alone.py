"""A bundle in a Python without torch, ultralytics and kd_yolo: same detections as ``predict``, and clear errors."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from kd_yolo.export import export
from ultralytics.utils.metrics import box_iou

from kd_yolo import KDYOLO
from kd_yolo.deploy import deploy
from kd_yolo.images import textured_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from detector_factory import NAMES, save_checkpoint, tiny_detector

FORBIDDEN = ("torch", "torchvision", "ultralytics", "kd_yolo", "onnx", "PIL", "yaml", "scipy", "matplotlib", "pydantic")
BLOCK = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise ImportError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Absent())
"""
SIZES = ((64, 64), (50, 90), (131, 70), (200, 200), (33, 65), (240, 320))
PREDICT: dict[str, Any] = {"imgsz": 64, "verbose": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint, its deployed forms, images below ``photos`` and a video."""
    home = tmp_path_factory.mktemp("bundles")
    source = save_checkpoint(tiny_detector(), home / "best.pt")
    deploy(source, out=home / "nms.pt")
    deploy(source, out=home / "nms-free.pt", nms=False)
    (home / "photos" / "below").mkdir(parents=True)
    for index, size in enumerate(SIZES):
        place = home / "photos" / ("below" if index % 2 else "") / f"größe {index}.png"
        cv2.imencode(".png", textured_images(1, size, seed=20 + index)[0])[1].tofile(place)
    writer = cv2.VideoWriter(str(home / "line.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (96, 72))
    for image in textured_images(7, (72, 96), seed=40):
        writer.write(image)
    writer.release()
    return home


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """Return a bundle with NMS outside, in float32."""
    made: Path = export(folder / "best.pt", format="bundle").path
    return made


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a Python in which nothing of ``FORBIDDEN`` can be imported."""
    return blocked(tmp_path_factory.mktemp("bare"), FORBIDDEN)


def blocked(folder: Path, forbidden: Sequence[str]) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(BLOCK.format(forbidden=tuple(forbidden)), encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def run(
    bundle: Path, environment: dict[str, str], *words: str | Path, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(bundle / "detect.py"), "--threads", "1", *map(str, words)]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(found: Sequence[dict[str, Any]], results: Sequence[Any], score: float = 1e-3) -> None:
    """Compare the lines of ``detect.py`` with the results of ``predict``: same labels, boxes and scores, in order."""
    assert len(found) == len(results)
    total = 0
    for line, result in zip(found, results, strict=True):
        assert [item["class"] for item in line["detections"]] == [NAMES[int(label)] for label in result.boxes.cls]
        total += len(line["detections"])
        for item, box, confidence in zip(line["detections"], result.boxes.xyxy, result.boxes.conf, strict=True):
            ours = torch.tensor(item["box_xyxy_px"])[None]
            assert float(box_iou(ours, box[None].cpu())) >= 0.99 or torch.allclose(ours[0], box.cpu(), atol=2e-3)
            assert abs(item["confidence"] - float(confidence)) <= score
    assert total >= 3 * len(found), "too few detections to prove anything"


def photos(folder: Path) -> list[str]:
    return sorted(str(path) for path in (folder / "photos").rglob("*.png"))


def test_bare__nothing_else_can_be_imported(bare: dict[str, str]) -> None:
    """Guards every test below: without the block they would prove nothing."""
    for name in FORBIDDEN:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], env=bare, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"No module named '{name}'" in done.stderr


# ---- same detections as predict --------------------------------------------------------------------------------------


def test_detect__folder_as_predict(folder: Path, bundle: Path, bare: dict[str, str]) -> None:
    found = lines(run(bundle, bare, "--source", folder / "photos", "--json"))
    files = photos(folder)
    assert [line["image"] for line in found] == files
    assert all(line["frame"] is None and set(line["milliseconds"]) == {"pre", "infer", "post"} for line in found)
    results = [KDYOLO(folder / "nms.pt").predict(file, **PREDICT)[0] for file in files]
    assert_same(found, results)
    assert len({item["class"] for line in found for item in line["detections"]}) > 1


def test_detect__assert_same_refuses_wrong_twins(folder: Path, bundle: Path, bare: dict[str, str]) -> None:
    """Guards the comparison itself: another class, a shifted box and another score must not pass."""
    file = photos(folder)[0]
    results = KDYOLO(folder / "nms.pt").predict(file, **PREDICT)
    (line,) = lines(run(bundle, bare, "--source", file, "--json"))
    first = line["detections"][0]
    assert_same([line], results)
    shifted = [value + 1.0 for value in first["box_xyxy_px"]]
    other = next(name for name in NAMES.values() if name != first["class"])
    for twin in ({"class": other}, {"box_xyxy_px": shifted}, {"confidence": first["confidence"] + 0.002}):
        with pytest.raises(AssertionError):
            assert_same([{"detections": [{**first, **twin}, *line["detections"][1:]]}], results)


@pytest.mark.parametrize(("conf", "iou", "classes"), [(0.05, 0.3, None), (0.6, 0.9, [0, 2])])
def test_detect__options_as_predict(
    folder: Path, bundle: Path, bare: dict[str, str], conf: float, iou: float, classes: list[int] | None
) -> None:
    words: list[str | Path] = ["--source", folder / "photos", "--conf", str(conf), "--iou", str(iou), "--json"]
    if classes:
        words += ["--classes", NAMES[classes[0]], str(classes[1])]  # by name, and by number
    model = KDYOLO(folder / "nms.pt")
    results = [model.predict(f, conf=conf, iou=iou, classes=classes, **PREDICT)[0] for f in photos(folder)]
    assert_same(lines(run(bundle, bare, *words)), results)


def test_detect__video_as_predict(folder: Path, bundle: Path, bare: dict[str, str], tmp_path: Path) -> None:
    found = lines(run(bundle, bare, "--source", folder / "line.avi", "--json", "--save", tmp_path / "seen"))
    assert [line["frame"] for line in found] == [1, 2, 3, 4, 5, 6, 7]
    assert_same(found, KDYOLO(folder / "nms.pt").predict(str(folder / "line.avi"), **PREDICT))
    capture = cv2.VideoCapture(str(tmp_path / "seen" / "line.avi.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (7, 10)


@pytest.mark.parametrize(
    ("keys", "twin"),
    [
        ({"nms_free": True}, "nms-free.pt"),
        ({"quantize": 16}, None),
        ({"batch": 4}, "nms.pt"),
        ({"dynamic": True, "batch": 2}, "nms.pt"),
    ],
    ids=["nms-free", "fp16", "batch-4", "dynamic"],
)
def test_detect__every_kind_of_model_as_predict(
    folder: Path, bare: dict[str, str], tmp_path: Path, keys: dict[str, Any], twin: str | None
) -> None:
    made = export(folder / "best.pt", format="bundle", out=tmp_path / "made_bundle", **keys).path
    model = KDYOLO(folder / twin) if twin else KDYOLO(made / "model.onnx")  # float16 has no twin but itself
    found = lines(run(made, bare, "--source", folder / "photos", "--json"))
    assert_same(found, [model.predict(file, **PREDICT)[0] for file in photos(folder)])


def test_detect__grey_model_as_predict(folder: Path, bare: dict[str, str], tmp_path: Path) -> None:
    model = tiny_detector(form=None)
    first: Any = model.model[0]
    old = first.conv
    first.conv = torch.nn.Conv2d(1, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
    model.yaml["channels"] = 1
    made = export(save_checkpoint(model, tmp_path / "best.pt"), format="bundle").path
    twin = KDYOLO(made / "model.onnx")
    found = lines(run(made, bare, "--source", folder / "photos", "--json", "--save", tmp_path / "seen"))
    assert_same(found, [twin.predict(file, **PREDICT)[0] for file in photos(folder)])
    assert len(list((tmp_path / "seen").rglob("*.png"))) == len(SIZES)
    frames = lines(run(made, bare, "--source", folder / "line.avi", "--json"))
    assert_same(frames, twin.predict(str(folder / "line.avi"), **PREDICT))


# ---- what else it does -----------------------------------------------------------------------------------------------


def test_detect__saves_below_as_it_lay(folder: Path, bundle: Path, bare: dict[str, str], tmp_path: Path) -> None:
    done = run(bundle, bare, "--source", folder / "photos", "--save", tmp_path / "seen")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(SIZES)
    assert "CPUExecutionProvider (auto)" in done.stderr
    for file in photos(folder):
        written = tmp_path / "seen" / Path(file).relative_to(folder / "photos")
        before, after = (cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) for path in (file, written))
        assert before is not None
        assert after is not None
        assert before.shape == after.shape
        assert (before != after).any(), "nothing was drawn"


def test_detect__from_another_folder_and_moved(
    folder: Path, bundle: Path, bare: dict[str, str], tmp_path: Path
) -> None:
    moved = shutil.copytree(bundle, tmp_path / "somewhere else" / "bündel")
    done = run(moved, bare, "--source", "photos", "--json", cwd=folder)
    assert len(lines(done)) == len(SIZES)
    narrow = {**bare, "PYTHONIOENCODING": "ascii"}  # a console that cannot print the files' names
    assert len(run(moved, narrow, "--source", "photos", cwd=folder).stdout.splitlines()) == len(SIZES)
    assert not (moved / "__pycache__").exists()


@pytest.mark.parametrize("as_json", [True, False])
def test_detect__benchmark(folder: Path, bundle: Path, bare: dict[str, str], as_json: bool) -> None:
    words: list[str | Path] = ["--source", folder / "photos", "--benchmark", "20", "--provider", "cpu"]
    done = run(bundle, bare, *words, *(["--json"] if as_json else []))
    assert done.returncode == 0, done.stderr
    assert "CPUExecutionProvider (cpu)" in done.stderr
    if as_json:
        figures = json.loads(done.stdout)
        assert figures["calls"] == 20
        assert set(figures["milliseconds"]) == {"pre", "infer", "post", "all"}
        for row in figures["milliseconds"].values():
            assert 0 < row["p50"] <= row["p90"] <= row["p99"]
    else:
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["ms", "pre", "infer", "post", "all"]


def test_detect__broken_file_in_a_folder_is_a_warning(
    folder: Path, bundle: Path, bare: dict[str, str], tmp_path: Path
) -> None:
    shutil.copy(photos(folder)[0], tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "c.jpg").write_bytes(b"")
    (tmp_path / "d.avi").write_bytes(b"RIFF")
    done = run(bundle, bare, "--source", tmp_path, "--json")
    assert [Path(line["image"]).name for line in lines(done)] == ["b.png"]
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert [name for name in ("a.png", "c.jpg", "d.avi") if any(name in line for line in warnings)] == [
        "a.png",
        "c.jpg",
        "d.avi",
    ]
    assert len(warnings) == 3


def test_detect__ctrl_c_ends_cleanly(folder: Path, bundle: Path, bare: dict[str, str], tmp_path: Path) -> None:
    """On a folder that would take long: the images so far are out, one line, no traceback, status 130."""
    for index in range(3000):
        (tmp_path / f"{index}.png").hardlink_to(photos(folder)[-1])
    command = [sys.executable, str(bundle / "detect.py"), "--source", str(tmp_path), "--json"]
    # A shell without job control starts what runs in its background deaf to Ctrl-C, and so would the child be.
    hearing = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, env=bare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hearing
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["detections"]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "detect.py: stopped"
    assert "Traceback" not in said


def test_detect__reader_that_stops_early_is_no_error(
    folder: Path, bundle: Path, bare: dict[str, str], tmp_path: Path
) -> None:
    for index in range(1500):
        (tmp_path / f"{index}.png").hardlink_to(photos(folder)[-1])
    command = [sys.executable, str(bundle / "detect.py"), "--source", str(tmp_path), "--json"]
    process = subprocess.Popen(command, env=bare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in said
    assert "Error" not in said


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that says what is wrong."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    *before, last = done.stderr.splitlines()
    assert all("warning" in line or "ExecutionProvider" in line for line in before), done.stderr
    assert last.startswith("detect.py: ")
    return last


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--source"),
        (("--source", "photo"), "photo: no such file or folder"),
        (("--source", "empty"), "empty: no images or videos in it"),
        (("--source", "broken"), "broken: nothing in it can be read"),
        (("--source", "broken/a.png"), "a.png: cannot be read as an image"),
        (("--source", "broken/b.mp4"), "b.mp4: cannot be opened"),
        (("--source", "7"), "camera 7: cannot be opened"),
        (("--source", "photos", "--conf", "2"), "'2' is not a number from 0 to 1"),
        (("--source", "photos", "--iou", "x"), "'x' is not a number from 0 to 1"),
        (("--source", "photos", "--conf", "nan"), "'nan' is not a number from 0 to 1"),
        (("--source", "photos", "--benchmark", "0"), "--benchmark"),
        (("--source", "photos", "--classes", "rust"), "rust: unknown class (known: scratch, dent, stain)"),
        (("--source", "photos", "--provider", "cuda"), "--provider cuda: this onnxruntime does not have it"),
        (("--source", "photos", "--provider", "tpu"), "tpu"),
        (("--source", "photos", "--save", "photos"), "would overwrite"),
        (("--source", "photos", "--save", "broken/a.png"), "cannot be written"),
        (("--source", "photos", "--speed", "1"), "--speed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_detect__bad_input(
    folder: Path, bundle: Path, bare: dict[str, str], tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "broken" / "b.mp4").write_bytes(b"no video")
    shutil.copytree(folder / "photos", tmp_path / "photos")
    done = run(bundle, bare, *words, cwd=tmp_path)
    if "--save" in words:
        done.stdout = ""  # the first picture is printed before it is drawn
    assert says in refused(done)


def test_detect__nms_inside_as_predict_and_its_limits(folder: Path, bare: dict[str, str], tmp_path: Path) -> None:
    made = export(folder / "best.pt", format="bundle", out=tmp_path / "inside_bundle", nms=True).path
    source = ("--source", folder / "photos")
    model = KDYOLO(folder / "nms.pt")
    assert_same(lines(run(made, bare, *source, "--json")), [model.predict(f, **PREDICT)[0] for f in photos(folder)])
    high = [model.predict(f, conf=0.5, **PREDICT)[0] for f in photos(folder)]
    assert_same(lines(run(made, bare, *source, "--json", "--conf", "0.5")), high)
    for words in (("--conf", "0.1"), ("--iou", "0.5")):
        line = refused(run(made, bare, *source, *words))
        assert "fixed limits; use --conf 0.25 or more and --iou 0.7" in line


def damage(bundle: Path, how: str) -> None:
    if how == "a bit of the model":
        content = bytearray((bundle / "model.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / "model.onnx").write_bytes(content)
    elif how == "no model":
        (bundle / "model.onnx").unlink()
    elif how == "no metadata":
        (bundle / "metadata.json").unlink()
    elif how == "no detector.py":
        (bundle / "detector.py").unlink()
    elif how == "half the metadata":
        text = (bundle / "metadata.json").read_text(encoding="utf-8")
        (bundle / "metadata.json").write_text(text[: len(text) // 2], encoding="utf-8")
    else:
        about = json.loads((bundle / "metadata.json").read_text(encoding="utf-8"))
        del about["canvas"]
        (bundle / "metadata.json").write_text(json.dumps(about), encoding="utf-8")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("a bit of the model", "model.onnx: damaged"),
        ("no model", "model.onnx: No such file"),
        ("no metadata", "metadata.json: No such file"),
        ("no detector.py", "No module named 'detector'"),
        ("half the metadata", "metadata.json: damaged"),
        ("a key of the metadata", "metadata.json: damaged (KeyError('canvas'))"),
    ],
)
def test_detect__damaged_bundle(
    folder: Path, bundle: Path, bare: dict[str, str], tmp_path: Path, how: str, says: str
) -> None:
    copied = shutil.copytree(bundle, tmp_path / "copied")
    damage(copied, how)
    line = refused(run(copied, bare, "--source", folder / "photos"))
    assert says in line
    assert "copy the whole bundle again" in line


@pytest.mark.parametrize("name", ["numpy", "cv2", "onnxruntime"])
def test_detect__missing_package(folder: Path, bundle: Path, tmp_path: Path, name: str) -> None:
    environment = blocked(tmp_path, [*FORBIDDEN, name])
    line = refused(run(bundle, environment, "--source", folder / "photos"))
    assert name in line
    assert "pip install -r requirements.txt" in line
