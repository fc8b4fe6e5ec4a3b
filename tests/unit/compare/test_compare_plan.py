"""From keys to runs: matched arguments, one address a run, shared teachers, folds."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kd_yolo.compare import cells as cells_module
from kd_yolo.compare import plan as plan_module
from kd_yolo.compare.cells import TEACHER, Cell
from kd_yolo.compare.folds import fold_of, make_folds
from kd_yolo.compare.identity import address_of, data_fingerprint, device_kind
from kd_yolo.compare.plan import Plan, plan
from kd_yolo.compare.settings import split_compare_keys
from kd_yolo.data.datayaml import label_path, load_data_yaml
from kd_yolo.data.synthetic import make_steel_synth
from kd_yolo.errors import ConfigError, DataError, KDYoloError, TeacherError
from kd_yolo.nn.student import StudentSpec

Lay = Callable[..., Plan]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_steel_synth(tmp_path_factory.mktemp("compare") / "steel", train=24, val=8, test=8, seed=3)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    file = tmp_path / "big" / "weights" / "best.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a teacher")
    return file


@pytest.fixture
def lay(data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """Return a function that lays out a comparison; structures are small stand-ins, so nothing heavy is built."""
    monkeypatch.setattr(
        cells_module, "resolve_student", lambda config: StudentSpec(config.model, {"name": config.model}, None, 32)
    )
    monkeypatch.setattr(cells_module, "check_training_inputs", lambda *given: {})

    def build(**given: Any) -> Plan:
        base: dict[str, Any] = {
            "data": str(data),
            "students": "lightnet-n",
            "methods": "none,score-l2",
            "teacher": str(teacher),
        }
        base |= {"seeds": "0,1", "epochs": 4, "imgsz": 64, "batch": 8, "device": "cpu", "project": str(tmp_path)}
        return plan(*split_compare_keys({**base, **given}))

    return build


def without(arguments: Any, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in dict(arguments).items() if key not in keys}


def by_place(laid: Plan) -> dict[tuple[str, str, int, int | None], Cell]:
    return {(one.student, one.method, one.seed, one.fold): one for one in laid.cells}


def test_plan__budgets_are_equal_by_construction(lay: Lay) -> None:
    laid = lay(students="lightnet-n,lightnet-s", methods="none,score-l2,kd-lightnet", lr0=0.02, mosaic=0.5, balance=0.3)
    assert len(laid.cells) == 2 * 3 * 2
    for student in laid.students:
        mine = [one for one in laid.cells if one.student == student]
        what = ("seed", "method", "teacher", "balance")
        assert len({str(sorted(without(one.job.arguments, *what).items())) for one in mine}) == 1
        assert {one.job.arguments["lr0"] for one in mine} == {0.02}
    plain = by_place(laid)["lightnet-n", "none", 0, None].job.arguments
    assert plain["teacher"] == "none"
    assert "balance" not in plain  # a distillation key means nothing without a teacher
    assert (plain["export"], plain["benchmark"], plain["plots"]) == ("none", False, False)


def test_plan__every_run_has_its_own_address_and_the_same_one_again(lay: Lay) -> None:
    first, second = lay(seeds="0,1,2"), lay(seeds="0,1,2,3")
    assert len({one.job.address for one in first.cells}) == len(first.cells)
    again = by_place(second)
    assert all(again[place].job == one.job for place, one in by_place(first).items())
    cell = by_place(first)["lightnet-n", "score-l2", 1, None]
    assert cell.job.name == f"lightnet-n-score-l2-s1-{cell.job.address[:10]}"
    assert cell.job.folder.parent.name == "runs"


@pytest.mark.parametrize(
    "given", [{"epochs": 5}, {"lr0": 0.5}, {"imgsz": 96}, {"batch": 4}, {"cache": "ram"}, {"optimizer": "SGD"}]
)
def test_plan__what_changes_the_training_changes_the_address(lay: Lay, given: dict[str, Any]) -> None:
    before, after = by_place(lay()), by_place(lay(**given))
    assert all(before[place].job.address != after[place].job.address for place in before)


@pytest.mark.parametrize(
    "given", [{"plots": True}, {"verbose": False}, {"threads": 2}, {"name": "other"}, {"lr0": 0.01}, {"retries": 4}]
)
def test_plan__what_does_not_change_it_does_not(lay: Lay, given: dict[str, Any]) -> None:
    before, after = by_place(lay()), by_place(lay(**given))
    assert all(before[place].job.address == after[place].job.address for place in before)


def test_plan__teacher_by_content_and_only_where_it_teaches(lay: Lay, teacher: Path, tmp_path: Path) -> None:
    before = by_place(lay())
    moved = tmp_path / "elsewhere.pt"
    shutil.copyfile(teacher, moved)
    same = by_place(lay(teacher=str(moved)))
    assert all(before[place].job.address == same[place].job.address for place in before)
    teacher.write_bytes(b"another teacher")
    after = by_place(lay())
    for place in before:
        assert (before[place].job.address == after[place].job.address) == (place[1] == "none")


def test_plan__method_file_by_what_it_resolves_to(lay: Lay, tmp_path: Path) -> None:
    file = tmp_path / "gentle.yaml"
    file.write_text("name: score-l2\nargs: {weight: 1.0}\n")
    first = by_place(lay(methods=f"none,score-l2,{file}"))
    assert first["lightnet-n", "gentle", 0, None].job.arguments["method"] == str(file)
    file.write_text("name: score-l2\nargs: {weight: 2.0}\n")
    second = by_place(lay(methods=f"none,score-l2,{file}"))
    changed = {place[1] for place in first if first[place].job.address != second[place].job.address}
    assert changed == {"gentle"}


def test_plan__self_teacher_is_the_baseline_run_and_comes_first(lay: Lay) -> None:
    laid = lay(teacher="self", methods="none,score-l2,kd-lightnet")
    first, second = laid.waves()
    assert [job.labels["method"] for job in first] == ["none", "none"]
    assert len(second) == 4
    for cell in laid.cells:
        if cell.method in {"score-l2", "kd-lightnet"}:
            own = next(job for job in first if job.labels["seed"] == cell.seed)
            assert cell.needs == own.name
            assert cell.job.arguments["teacher"] == str(own.checkpoint)
    # another epoch of the teacher's run is another teacher
    assert by_place(lay(teacher="self", epochs=5))["lightnet-n", "score-l2", 0, None].job.address != (
        by_place(laid)["lightnet-n", "score-l2", 0, None].job.address
    )


def test_plan__equal_total_gives_the_baseline_the_teachers_epochs(lay: Lay) -> None:
    laid = lay(teacher="self", control="equal_total")
    epochs = {(one.method, one.job.arguments["epochs"]) for one in laid.cells}
    assert epochs == {("none", 8), ("score-l2", 4), (TEACHER, 4)}
    assert Counter(map(len, laid.waves())) == Counter([4, 2])
    assert len({job.name for wave in laid.waves() for job in wave}) == 6


def test_plan__folds(lay: Lay) -> None:
    laid = lay(folds=4, seeds="0,1")
    assert len(laid.cells) == 2 * 2 * 4
    assert len({one.job.address for one in laid.cells}) == 16
    assert {one.job.images for one in laid.cells} == {24}
    assert {one.job.arguments["data"] for one in laid.cells} == {str(file) for file in laid.folds}


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"teacher": "nowhere.pt"}, TeacherError, "no such file"),
        ({"methods": "none,scorel2"}, ConfigError, "score-l2"),
        ({"students": "lightnet-n,lightnet-n"}, ConfigError, "given twice"),
        ({"device": "tpu"}, ConfigError, "unknown"),
        ({"device": "7"}, ConfigError, "CUDA devices"),
        ({"data": "nowhere.yaml"}, DataError, "not found"),
        ({"folds": 20}, ConfigError, "fewer folds"),
        ({"lr0": "much"}, ConfigError, "lr0"),
    ],
)
def test_plan__bad_input(
    lay: Lay, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], error: type[KDYoloError], said: str
) -> None:
    monkeypatch.undo()  # the real checks; every one of these stops before a network is built, but for the last
    with pytest.raises(error, match=said):
        lay(**given)


def test_plan__one_class_has_no_teacher(lay: Lay) -> None:
    with pytest.raises(ConfigError, match="single_cls=true: renames the classes"):
        lay(single_cls=True)
    assert lay(single_cls=True, methods="none", teacher="none").cells


def test_plan__two_files_of_one_name(lay: Lay, tmp_path: Path) -> None:
    files = []
    for folder in ("one", "two"):
        files.append(tmp_path / folder / "mine.yaml")
        files[-1].parent.mkdir()
        files[-1].write_text("name: score-l2\n")
    with pytest.raises(ConfigError, match="one name in the report"):
        lay(methods=f"none,{files[0]},{files[1]}")


def test_plan__checkpoints_are_called_after_their_runs(lay: Lay, teacher: Path) -> None:
    laid = lay(students=str(teacher))
    assert laid.students == ["big"]
    assert laid.teacher == "big/best.pt"


def test_plan__test_split_must_be_there(lay: Lay, data: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(data.read_text())
    file = tmp_path / "without.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if key != "test"}))
    with pytest.raises(DataError, match="no 'test' split"):
        lay(data=str(file), test=True)


def test_cuda_devices__one_run_a_gpu(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def devices(**given: Any) -> list[str]:
        keys = {"data": "d", "students": "a", "methods": "none", **given}
        return plan_module.cuda_devices(split_compare_keys(keys)[0])

    assert devices() == ["0", "1"]
    assert devices(device="1") == ["1"]
    assert devices(device=[0, 1]) == ["0", "1"]
    assert devices(device="cpu") == []
    assert devices(device="5", engine="ray") == ["5"]  # this machine's GPUs say nothing about the cluster's
    on_gpu = lay(device="0,1")
    assert {one.job.arguments["device"] for one in on_gpu.cells} == {0}
    assert {one.job.gpus for one in on_gpu.cells} == {1}
    assert {one.job.address for one in on_gpu.cells}.isdisjoint(one.job.address for one in lay().cells)


def test_address_of__order_and_defaults_do_not_matter() -> None:
    spec = StudentSpec("a", {"backbone": [1], "yaml_file": "x"}, None, 32)
    method = {"name": "cwd", "args": {"a": 1, "b": 2}}
    first = address_of(spec, method, {"seed": 0, "imgsz": 64, "lr0": 0.01}, "data", ["t"], {"pseudo": False})
    other = StudentSpec("b", {"yaml_file": "y", "backbone": [1]}, None, 32)
    second = address_of(other, {"args": {"b": 2, "a": 1}, "name": "cwd"}, {"imgsz": 64, "seed": 0}, "data", ["t"])
    assert first == second
    assert first != address_of(spec, method, {"seed": 0, "imgsz": 64}, "data", ["t"], {"pseudo": True})


def test_device_kind__equal_gpus_are_equal() -> None:
    assert [device_kind(one) for one in ("cpu", None, "mps", 0, "1", "cuda")] == ["cpu", "cpu", "mps", *["cuda"] * 3]


def test_data_fingerprint__content_not_place(data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(data.parent, moved)
    content = yaml.safe_load((moved / "data.yaml").read_text())
    (moved / "data.yaml").write_text(yaml.safe_dump({**content, "path": str(moved)}))
    assert data_fingerprint(moved / "data.yaml") == data_fingerprint(data)
    label = label_path(load_data_yaml(moved / "data.yaml").images("val")[0])
    label.write_text(label.read_text() + "0 0.5 0.5 0.1 0.1\n")
    assert data_fingerprint(moved / "data.yaml") != data_fingerprint(data)


def test_make_folds__each_image_is_held_out_once_and_test_never_enters(data: Path, tmp_path: Path) -> None:
    files = make_folds(data, 4, tmp_path / "folds")
    assert files == make_folds(data, 4, tmp_path / "folds")
    original = load_data_yaml(data)
    pool = {image.resolve() for split in ("train", "val") for image in original.images(split)}
    held_out: list[Path] = []
    for file in files:
        fold = load_data_yaml(file)
        train, val = ([image.resolve() for image in fold.images(split)] for split in ("train", "val"))
        assert set(train) | set(val) == pool
        assert not set(train) & set(val)
        assert {image.resolve() for image in fold.images("test")} == {i.resolve() for i in original.images("test")}
        held_out += val
        for image in fold.images("val"):
            assert label_path(image).read_text() == label_path(image.resolve()).read_text()
    assert Counter(held_out) == Counter(pool)


def test_fold_of__depends_on_the_data_alone_and_keeps_copies_together(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(data.parent, place)
    content = yaml.safe_load((place / "data.yaml").read_text())
    (place / "data.yaml").write_text(yaml.safe_dump({**content, "path": str(place)}))
    first = load_data_yaml(place / "data.yaml").images("train")[0]
    for suffix in "ab":
        twin = first.with_name(f"{first.stem}_{suffix}{first.suffix}")
        shutil.copyfile(first, twin)
        shutil.copyfile(label_path(first), label_path(twin))
    found = load_data_yaml(place / "data.yaml")
    images = [image for split in ("train", "val") for image in found.images(split)]
    parts = fold_of(found, images, 3)
    assert parts == fold_of(found, images, 3)
    assert len({part for image, part in zip(images, parts, strict=True) if image.stem.startswith(first.stem)}) == 1
    assert max(Counter(parts).values()) - min(Counter(parts).values()) <= 3
