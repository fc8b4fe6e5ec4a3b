"""Every bad input: one line that names the file or key and the remedy, exit status 2, nothing half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from kd_yolo.cli import main
from kd_yolo.resources import load_yaml


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command which must be refused, and returns its line."""

    def run(*words: str) -> str:
        capsys.readouterr()
        status = main(list(words))
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("kd-yolo: ")]
        assert status == 2, captured
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        return lines[0]

    return run


@pytest.fixture
def data_copy(tiny_data: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny data that a test may damage."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data.parent, folder)
    content = load_yaml(tiny_data)
    content["path"] = str(folder)
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    for cache in folder.rglob("*.cache"):
        cache.unlink()
    return folder / "data.yaml"


def words(data: Path | str, project: Path, **given: Any) -> list[str]:
    keys = {"data": data, "model": "lightnet-n", "imgsz": 64, "epochs": 1, "batch": 8, "device": "cpu"}
    keys |= {"project": project, "plots": False, "export": "none", "benchmark": False, **given}
    return ["train", *(f"{key}={value}" for key, value in keys.items())]


def first_label(data: Path) -> Path:
    return sorted(path for path in (data.parent / "labels" / "train").glob("*.txt") if path.read_text().strip())[0]


def checkpoint(path: Path, model: DetectionModel, names: list[str] | None = None, imgsz: int = 64) -> Path:
    if names is not None:
        model.names = dict(enumerate(names))
    torch.save({"epoch": -1, "model": model, "ema": None, "train_args": {"imgsz": imgsz}}, path)
    return path


# ---- data ------------------------------------------------------------------------------------------------------------


def test_data__missing_file(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused(*words(tmp_path / "nowhere.yaml", tmp_path / "runs"))
    assert "nowhere.yaml" in line
    assert not (tmp_path / "runs").exists()


def test_data__empty_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    line = refused(*words(tmp_path / "empty.yaml", tmp_path / "runs"))
    assert "empty.yaml" in line
    assert "empty" in line.replace("empty.yaml", "")


def test_data__published_set_not_there(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KD_YOLO_SHARED", raising=False)
    monkeypatch.setenv("KD_YOLO_DATA", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    line = refused(*words("neu.yaml", tmp_path / "runs"))
    assert "kd-yolo data convert from=voc" in line
    assert str(tmp_path / "datasets") in line


def test_data__class_id_out_of_range(refused: Callable[..., str], data_copy: Path, tmp_path: Path) -> None:
    label = first_label(data_copy)
    label.write_text("6 0.5 0.5 0.2 0.2\n")
    line = refused(*words(data_copy, tmp_path / "runs"))
    assert label.name in line
    assert "6" in line
    assert "kd-yolo data check" in line


def test_data__wrong_columns(refused: Callable[..., str], data_copy: Path, tmp_path: Path) -> None:
    label = first_label(data_copy)
    label.write_text("0 0.5 0.5 0.2\n")
    line = refused(*words(data_copy, tmp_path / "runs"))
    assert label.name in line
    assert "column" in line or "values" in line


def test_data__corrupt_image(refused: Callable[..., str], data_copy: Path, tmp_path: Path) -> None:
    image = sorted((data_copy.parent / "images" / "train").iterdir())[0]
    image.write_bytes(image.read_bytes()[:200])
    line = refused(*words(data_copy, tmp_path / "runs"))
    assert image.name in line
    assert not (tmp_path / "runs").exists()


# ---- teacher ---------------------------------------------------------------------------------------------------------


def test_teacher__missing(refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    assert "no-teacher.pt" in refused(*words(tiny_data, tmp_path / "runs", teacher=tmp_path / "no-teacher.pt"))


def test_teacher__truncated(refused: Callable[..., str], tiny_data: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(tiny_teacher.read_bytes()[:100_000])
    assert "cut.pt" in refused(*words(tiny_data, tmp_path / "runs", teacher=cut))


def test_teacher__not_a_checkpoint(refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("this is no checkpoint")
    assert "text.pt" in refused(*words(tiny_data, tmp_path / "runs", teacher=text))


def test_teacher__other_task(refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "cls.pt", ClassificationModel("yolo26n-cls.yaml", nc=6, verbose=False))
    line = refused(*words(tiny_data, tmp_path / "runs", teacher=path))
    assert "cls.pt" in line
    assert "classif" in line.lower()


def test_teacher__no_shared_class(refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "pets.pt", DetectionModel("yolo26n.yaml", nc=2, verbose=False), ["cat", "dog"])
    line = refused(*words(tiny_data, tmp_path / "runs", teacher=path))
    assert "no class name" in line
    assert "cat" in line


def test_teacher__other_canvas(refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    names = load_yaml(tiny_data)["names"]
    model = DetectionModel("yolo26n.yaml", nc=6, verbose=False)
    path = checkpoint(tmp_path / "big.pt", model, list(names.values()), imgsz=640)
    line = refused(*words(tiny_data, tmp_path / "runs", teacher=path))
    assert "imgsz=640" in line
    assert "allow_other_canvas=true" in line


def test_teacher__no_common_stride(refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    names = list(load_yaml(tiny_data)["names"].values())
    one_level = {
        "nc": 6,
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[[1], 1, "Detect", ["nc"]]],
    }
    path = checkpoint(tmp_path / "p2.pt", DetectionModel(one_level, verbose=False), names)
    line = refused(*words(tiny_data, tmp_path / "runs", teacher=path))
    assert "no common feature level" in line


def test_teacher__weak(refused: Callable[..., str], tiny_data: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    line = refused(*words(tiny_data, tmp_path / "runs", teacher=tiny_teacher))
    assert "mAP50 0.0" in line
    assert "allow_weak_teacher=true" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("given", [{"teacher": "self"}, {"chain": "lightnet-n,lightnet-n,lightnet-n"}])
def test_method__box_bins_that_the_student_lacks(
    given: dict[str, str], refused: Callable[..., str], tiny_data: Path, tmp_path: Path
) -> None:
    """Before the teacher is trained, not after."""
    command = words(tiny_data, tmp_path / "runs", method="ld", **given)
    line = refused(*(word for word in command if "chain" not in given or not word.startswith("model=")))
    assert "reg_max" in line
    assert not (tmp_path / "runs").exists()


class Foreign(torch.nn.Conv2d):
    """A layer of somebody else's package."""


@pytest.mark.parametrize("key", ["teacher", "model", "pretrained"])
def test_checkpoint__foreign_class(key: str, refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    model = DetectionModel("yolo26n.yaml", nc=6, verbose=False)
    model.model[0].conv = Foreign(3, 16, 3, 2, 1)
    path = checkpoint(tmp_path / "foreign.pt", model)
    line = refused(*words(tiny_data, tmp_path / "runs", **{key: path}))
    assert "Foreign" in line
    assert "trust=true" in line


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imgsz", ["0", "-64", "100", "64.5", "big"])
def test_imgsz__impossible(imgsz: str, refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    line = refused(*words(tiny_data, tmp_path / "runs", imgsz=imgsz))
    assert f"imgsz={imgsz}" in line
    if imgsz == "100":
        assert "use 96 or 128" in line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "kd-lightnet2"}, "kd-lightnet"),
        ({"model": "lightnet-x"}, "lightnet-"),
        ({"epoch": "5"}, "did you mean 'epochs'?"),
        ({"techer": "self"}, "did you mean 'teacher'?"),
        ({"kd.tua": "2"}, "did you mean 'tau'?"),
        ({"kd.tau": "high"}, "tau='high'"),
        ({"schedule.warmpu": "0.1"}, "did you mean 'warmup'?"),
        ({"schedule.off_last": "9"}, "off_last=9"),
        ({"distill_model": "x.pt"}, "use teacher=FILE"),
        ({"reparam": "repvvg"}, "reparam='repvvg'"),
        ({"epochs": "0"}, "epochs=0"),
        ({"lr0": "fast"}, "lr0"),
        ({"generations": "0"}, "generations=0"),
        ({"pretrained": "nowhere.pt"}, "nowhere.pt"),
    ],
)
def test_train__bad_key(
    given: dict[str, str], expected: str, refused: Callable[..., str], tiny_data: Path, tmp_path: Path
) -> None:
    line = refused(*words(tiny_data, tmp_path / "runs", **given))
    assert expected in line
    assert not (tmp_path / "runs").exists()


def test_train__no_data(refused: Callable[..., str]) -> None:
    assert "data=" in refused("train")


def test_command__unknown(refused: Callable[..., str]) -> None:
    assert "did you mean 'train'?" in refused("trian")


def test_words__not_key_value(refused: Callable[..., str]) -> None:
    assert "key=value" in refused("train", "steel-synth")


@pytest.mark.parametrize("command", ["val", "predict", "deploy", "export", "benchmark", "models", "methods", "demo"])
def test_commands__unknown_key(command: str, refused: Callable[..., str]) -> None:
    assert "imgzs" in refused(command, "imgzs=64")


@pytest.mark.parametrize("command", ["val", "predict", "deploy", "export", "benchmark"])
def test_commands__model_missing(command: str, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "model" in refused(command)
    extra = {"val": ["data=steel-synth"], "predict": [f"source={tmp_path}"]}.get(command, [])
    assert "gone.pt" in refused(command, f"model={tmp_path / 'gone.pt'}", *extra)


def test_project__not_writable(refused: Callable[..., str], tiny_data: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file where a folder is wanted")
    line = refused(*words(tiny_data, blocker / "runs"))
    assert str(blocker) in line
    assert "project=" in line
    if os.geteuid() != 0:  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert str(locked) in refused(*words(tiny_data, locked / "runs"))


def test_resume__nothing_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no unfinished run" in refused("train", "resume=true", f"project={tmp_path}")


def test_predict__source_missing(refused: Callable[..., str], tiny_teacher: Path, tmp_path: Path) -> None:
    assert "no-photos" in refused("predict", f"model={tiny_teacher}", f"source={tmp_path / 'no-photos'}")
