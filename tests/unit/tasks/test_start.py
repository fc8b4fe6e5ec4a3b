"""Where a student's first weights come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import SETTINGS

from kd_yolo.compare.plan import plan
from kd_yolo.compare.settings import split_compare_keys
from kd_yolo.config import TrainConfig
from kd_yolo.data.datayaml import load_data_yaml
from kd_yolo.errors import ConfigError, ModelError
from kd_yolo.images import dataset_files
from kd_yolo.nn.lightnet import build_model
from kd_yolo.nn.student import student_spec
from kd_yolo.tasks.peer import fits, inherits, pretrained_peer
from kd_yolo.tasks.start import narrow_on_images, own_teacher, say_own_teacher, start_source

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str, model: str = "yolo26n.yaml", nc: int = 6, imgsz: int = 64) -> Path:
        torch.manual_seed(0)
        network = DetectionModel(model, nc=nc, verbose=False)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"epoch": -1, "model": network.half(), "ema": None, "train_args": {"imgsz": imgsz}}, path)
        return path

    return write


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder without pretrained files."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setitem(SETTINGS, "weights_dir", str(tmp_path / "weights"))
    return folder


def config(**given: Any) -> TrainConfig:
    return TrainConfig(**{"data": "steel-synth", "model": "lightnet-n", **given})


@pytest.mark.parametrize("name", ["lightnet-n", "lightnet-s"])
def test_shipped_models__every_row_stands_for_one_of_its_kind(name: str) -> None:
    model, peer = build_model(name, nc=6), DetectionModel("yolo26n.yaml", nc=6, verbose=False)
    said = inherits(model.yaml)
    assert said is not None
    assert fits(peer, said)
    assert len(said.rows) == len(model.model)
    assert said.rows == sorted(said.rows)
    kinds = {"RepBlock": "Conv"}
    for mine, row in zip(model.model, said.rows, strict=True):
        assert kinds.get(type(mine).__name__, type(mine).__name__) == type(peer.model[row]).__name__


@pytest.mark.parametrize("name", ["yolo26s.yaml", "yolo11n.yaml", "yolov8n.yaml"])
def test_fits__another_network_does_not(name: str) -> None:
    said = inherits(build_model("lightnet-n", nc=6).yaml)
    assert said is not None
    assert not fits(DetectionModel(name, nc=6, verbose=False), said)


@pytest.mark.parametrize(
    ("content", "said"),
    [("yolo26n", "mapping"), ({"from": "yolo26n"}, "rows"), ({"from": "yolo26n", "row": [0]}, "rows")],
)
def test_inherits__malformed(content: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        inherits({"inherits": content})
    with pytest.raises(ConfigError, match="rows"):
        inherits({"inherits": {"from": "yolo26n", "rows": ["one", "two"]}})


def test_pretrained_peer__working_folder_before_weights_dir(save: Save, elsewhere: Path) -> None:
    spec = student_spec("lightnet-n")
    kept = save("weights/yolo26n.pt")
    assert pretrained_peer(config(), spec) == kept.resolve()
    near = save("work/yolo26n.pt")
    assert pretrained_peer(config(), spec) == near.resolve()
    assert pretrained_peer(config(pretrained=False), spec) is None
    assert pretrained_peer(config(model="yolo26n.yaml"), student_spec("yolo26n.yaml")) is None


@pytest.mark.usefixtures("elsewhere")
def test_pretrained_peer__says_what_is_missing_and_where(save: Save, heard: Any) -> None:
    teacher = save("t.pt")
    assert pretrained_peer(config(), student_spec("lightnet-n"), [teacher]) is None
    assert "pretrained" not in heard.text  # it starts from that teacher
    assert pretrained_peer(config(), student_spec("lightnet-n"), [save("b.pt", "yolo11n.yaml")]) is None
    assert "yolo26n.pt" in heard.text
    assert "pretrained=FILE" in heard.text


def test_start_source__pretrained_then_teacher_then_peer(save: Save) -> None:
    mine, teacher, peer, other = (
        save("a.pt"),
        save("t.pt"),
        save("yolo26n.pt", nc=80),
        save("b.pt", "yolo11n.yaml"),
    )
    plain = student_spec("lightnet-n")

    def chosen(spec: Any = plain, teachers: Any = (), at_hand: Path | None = None, **given: Any) -> Path | None:
        found = start_source(config(**given), spec, teachers, at_hand)
        return found[0] if found else None

    assert chosen(teachers=[teacher], at_hand=peer) == teacher
    assert chosen(teachers=[other, teacher], at_hand=peer) == teacher
    assert chosen(teachers=[other], at_hand=peer) == peer
    assert chosen(teachers=[other]) is None
    explicit = student_spec("lightnet-n", weights=mine)
    assert chosen(explicit, [teacher], peer, pretrained=str(mine)) == mine
    assert chosen(teachers=[teacher], at_hand=peer, pretrained=False) is None
    assert chosen(student_spec("yolo26n.yaml"), [teacher], peer) is None


def test_start_source__a_checkpoint_goes_on_from_itself(save: Save) -> None:
    student, teacher = save("mine.pt", "yolo26n.yaml"), save("t.pt")
    spec = student_spec(str(student))
    spec.cfg["inherits"] = {"from": "yolo26n", "rows": list(range(24))}
    assert start_source(config(model=str(student)), spec, [teacher], None) is None


def test_own_teacher__the_pretrained_detector_unless_another_is_named(save: Save) -> None:
    peer = save("yolo26n.pt", nc=80)
    assert own_teacher(config(), peer).weights == peer.resolve()
    assert own_teacher(config(), None).name == "lightnet-n"
    assert own_teacher(config(teacher_model="lightnet-s"), peer).name == "lightnet-s"


def test_narrow_on_images__canvas_is_bounded(tiny_data: Path, save: Save) -> None:
    source = DetectionModel("yolo26n.yaml", nc=6, verbose=False).eval()
    target = build_model("lightnet-n", nc=6)
    said = inherits(target.yaml)
    assert said is not None
    files = dataset_files(tiny_data, "train")
    assert len(load_data_yaml(tiny_data).images("train")) == len(files)
    report = narrow_on_images(target, source, said.rows, files, 64)
    assert report.images <= len(files)
    assert 0.5 < report.share <= 1


def test_compare__all_runs_of_a_student_have_one_start(tiny_data: Path, save: Save, tmp_path: Path) -> None:
    teacher = save("big.pt")
    keys: dict[str, Any] = {
        "data": str(tiny_data),
        "students": "lightnet-n,yolo26n.yaml",
        "methods": "none,kd-lightnet",
    }
    keys |= {"teacher": str(teacher), "seeds": "0,1", "epochs": 1, "imgsz": 64, "project": str(tmp_path)}
    laid = plan(*split_compare_keys(keys))
    light = [cell.job for cell in laid.cells if cell.student == "lightnet-n"]
    assert len(light) == 4
    assert {job.arguments["pretrained"] for job in light} == {str(teacher)}
    assert {job.arguments["mosaic"] for job in light} == {0.0}
    stock = [cell.job for cell in laid.cells if cell.student != "lightnet-n"]
    assert not any({"pretrained", "mosaic"} & set(job.arguments) for job in stock)
    given = plan(*split_compare_keys({**keys, "mosaic": 1.0}))
    assert {cell.job.arguments["mosaic"] for cell in given.cells} == {1.0}
    assert not {cell.job.address for cell in given.cells if cell.student == "lightnet-n"} & {j.address for j in light}


def test_say_own_teacher__which_file_and_where_the_student_starts(save: Save, heard: Any) -> None:
    peer, foreign = save("yolo26n.pt", nc=80), save("yolo11n.pt", "yolo11n.yaml", nc=80)

    def said(given: TrainConfig, at_hand: Path | None) -> str:
        before = len(heard.text)
        student = student_spec(given.model, weights=foreign if given.pretrained == str(foreign) else None)
        say_own_teacher(given, own_teacher(given, at_hand), student, at_hand)
        return str(heard.text[before:])

    line = said(config(), peer)
    assert f"first {peer} is fine-tuned on this data" in line
    assert "lightnet-n is trained under it, with the weights of that teacher to start from" in line
    line = said(config(), None)
    assert "first a lightnet-n is trained from random weights" in line
    assert "to start from" not in line
    line = said(config(pretrained=str(foreign)), None)
    assert f"first a lightnet-n is trained from what {foreign} has of it" in line
    assert f"with the weights of {peer} to start from" in said(config(pretrained=str(peer)), peer)
