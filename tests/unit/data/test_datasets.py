from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from data_factory import NEU, neu_published, yolo_set
from test_convert_deeppcb import deeppcb
from test_convert_masks import tiles

from kd_yolo.data.convert import convert
from kd_yolo.data.datasets import data_root, describe_datasets, load_builtin, resolve_dataset
from kd_yolo.data.datayaml import load_data_yaml
from kd_yolo.data.splits import expand_stems
from kd_yolo.errors import ConfigError, DataError, OutputError
from kd_yolo.resources import builtin_names, find


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and no settings from outside."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("KD_YOLO_DATA", raising=False)
    monkeypatch.delenv("KD_YOLO_SHARED", raising=False)
    return folder


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_data_root__argument_then_environment_then_datasets(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_root() == work / "datasets"
    monkeypatch.setenv("KD_YOLO_DATA", str(work / "env"))
    assert data_root() == work / "env"
    assert data_root(work / "given") == work / "given"


def test_builtin__every_yaml_is_well_formed() -> None:
    assert builtin_names("datasets") == ["deeppcb", "magnetic-tile", "neu", "pku-pcb", "steel-synth"]
    assert set(describe_datasets()) == set(builtin_names("datasets"))
    for name in builtin_names("datasets"):
        spec = load_builtin(find("datasets", name))
        assert sorted(spec.names) == list(range(len(spec.names)))
        assert (spec.raw is None) != (spec.make is None)


def test_builtin__fixed_split_of_neu_is_stratified_and_disjoint() -> None:
    split = load_builtin(find("datasets", "neu")).split
    assert split is not None
    val, test = expand_stems(split["val"]), expand_stems(split["test"])
    assert len(set(val)) == len(set(test)) == 180
    assert not set(val) & set(test)
    for name in NEU:
        assert (
            sum(stem.startswith(f"{name}_") for stem in val) == sum(stem.startswith(f"{name}_") for stem in test) == 30
        )


def test_resolve_dataset__own_yaml_with_absolute_path_is_returned_untouched(work: Path, tmp_path: Path) -> None:
    file = yolo_set(tmp_path / "set")
    assert resolve_dataset(str(file)) == file
    assert resolve_dataset(str(tmp_path / "set")) == file
    assert not list(work.iterdir())


def test_resolve_dataset__own_yaml_with_relative_path_is_resolved(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yolo_set(tmp_path / "set")
    file = tmp_path / "set/mine.yaml"
    file.write_text("train: images/train\nval: images/val\nnames: [a, b]\ndownload: bash get.sh\nchannels: 3\n")
    resolved = resolve_dataset(str(file))
    assert resolved.is_relative_to(work / "datasets/.kd-yolo")
    content = yaml.safe_load(resolved.read_text())
    assert content == {
        "path": str(tmp_path / "set"),
        "train": str(tmp_path / "set/images/train"),
        "val": str(tmp_path / "set/images/val"),
        "names": {0: "a", 1: "b"},
        "channels": 3,
    }
    assert load_data_yaml(resolved).ready
    assert resolve_dataset(str(file)) == resolved
    monkeypatch.chdir(tmp_path)
    assert load_data_yaml(resolved).path == tmp_path / "set"


def test_resolve_dataset__local_file_wins_over_the_builtin(work: Path, tmp_path: Path) -> None:
    file = yolo_set(tmp_path / "set")
    (work / "neu.yaml").write_text(file.read_text())
    assert resolve_dataset("neu.yaml") == work / "neu.yaml"


@pytest.mark.parametrize("place", ["datasets/NEU-DET", "datasets/neu-det", "NEU-DET"])
def test_resolve_dataset__raw_neu_is_converted_once(work: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    neu_published(work / place)
    first = resolve_dataset("neu")
    assert first == work / "datasets/neu/data.yaml"
    shown = capsys.readouterr()
    assert "converting" in shown.err
    assert not shown.out
    before = snapshot(work)
    assert resolve_dataset("neu.yaml") == first
    assert snapshot(work) == before
    assert not capsys.readouterr().err
    assert load_data_yaml(first).ready
    assert load_data_yaml(first).names == list(NEU)


def test_resolve_dataset__shared_folder_from_the_environment(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neu_published(tmp_path / "shared/datasets/neu-det", splits=True)
    monkeypatch.setenv("KD_YOLO_SHARED", str(tmp_path / "shared"))
    resolve_dataset("neu")
    record = json.loads((work / "datasets/neu/conversion.json").read_text())
    assert record["images"] == {"train": 48, "val": 6, "test": 6}


def test_resolve_dataset__changed_raw_data_is_converted_again(work: Path) -> None:
    raw = neu_published(work / "NEU-DET")
    file = resolve_dataset("neu")
    (raw / "IMAGES/crazing_1.jpg").unlink()
    (raw / "ANNOTATIONS/crazing_1.xml").unlink()
    assert resolve_dataset("neu") == file
    data = load_data_yaml(file)
    assert sum(len(data.images(split)) for split in data.splits) == 59


def test_resolve_dataset__what_the_user_converted_is_never_redone(work: Path) -> None:
    raw = neu_published(work / "NEU-DET")
    convert("voc", raw, work / "datasets/neu")
    (raw / "IMAGES/crazing_1.jpg").unlink()
    before = snapshot(work / "datasets")
    assert resolve_dataset("neu") == work / "datasets/neu/data.yaml"
    assert snapshot(work / "datasets") == before


def test_resolve_dataset__what_others_converted_is_used(work: Path) -> None:
    neu_published(work / "NEU-DET")
    file = yolo_set(work / "datasets/neu", names=NEU)
    assert resolve_dataset("neu") == file


def test_resolve_dataset__a_moved_folder_is_put_right(work: Path) -> None:
    neu_published(work / "NEU-DET")
    resolve_dataset("neu")
    (work / "datasets").rename(work / "moved")
    (work / "NEU-DET").rename(work / "away")
    file = resolve_dataset("neu", root=work / "moved")
    assert load_data_yaml(file).path == work / "moved/neu"


def test_resolve_dataset__nothing_found_says_where_and_how(work: Path) -> None:
    with pytest.raises(DataError) as caught:
        resolve_dataset("neu")
    text = str(caught.value)
    for place in (work / "datasets/neu", work / "datasets/NEU-DET", work / "NEU-DET"):
        assert str(place) in text
    assert text.endswith("kd-yolo data convert from=voc src=FOLDER out=datasets/neu")
    assert "\n" not in text
    assert not list(work.iterdir())


def test_resolve_dataset__printed_command_names_the_group(work: Path) -> None:
    with pytest.raises(DataError, match=r"from=masks src=FOLDER out=datasets/magnetic-tile group='similar'$"):
        resolve_dataset("magnetic-tile")


def test_resolve_dataset__magnetic_tile_raw_of_the_same_name(work: Path) -> None:
    tiles(work / "datasets/magnetic-tile")
    file = resolve_dataset("magnetic-tile")
    assert file == work / "datasets/magnetic-tile-yolo/data.yaml"
    assert load_data_yaml(file).names == ["Blowhole", "Break", "Crack", "Fray", "Uneven"]


def test_resolve_dataset__deeppcb(work: Path) -> None:
    deeppcb(work / "DeepPCB/PCBData")
    data = load_data_yaml(resolve_dataset("deeppcb"))
    assert data.names == ["open", "short", "mousebite", "spur", "copper", "pin-hole"]
    assert len(data.images("test")) == 8


def test_resolve_dataset__steel_synth_is_made_once(work: Path) -> None:
    spec = work / "tiny.yaml"
    text = find("datasets", "steel-synth").read_text().replace("train: 240", "train: 6")
    spec.write_text(text.replace("val: 60", "val: 3").replace("test: 60", "test: 0"))
    first = resolve_dataset(str(spec))
    assert first == work / "datasets/tiny/data.yaml"
    before = snapshot(work)
    assert resolve_dataset(str(spec)) == first
    assert snapshot(work) == before
    spec.write_text(spec.read_text().replace("seed: 0", "seed: 1"))
    resolve_dataset(str(spec))
    assert snapshot(work / "datasets") != before


def test_resolve_dataset__steel_synth_by_name(work: Path) -> None:
    file = resolve_dataset("steel-synth")
    assert resolve_dataset("steel-synth.yaml") == file == work / "datasets/steel-synth/data.yaml"
    data = load_data_yaml(file)
    assert {split: len(data.images(split)) for split in data.splits} == {"train": 240, "val": 60, "test": 60}


def test_resolve_dataset__processes_that_start_together_make_it_once(work: Path) -> None:
    code = "from kd_yolo.data.datasets import resolve_dataset; print(resolve_dataset('neu'))"
    neu_published(work / "NEU-DET")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert {out.strip() for out, _ in results} == {str(work / "datasets/neu/data.yaml")}
    assert sum("converting" in err for _, err in results) == 1
    assert sorted(path.name for path in (work / "datasets").iterdir()) == [".kd-yolo", "neu"]


def test_resolve_dataset__unknown_class_in_the_raw_data_is_refused(work: Path) -> None:
    raw = tiles(work / "datasets/magnetic-tile")
    (raw / "MT_Crack").rename(raw / "MT_Dent")
    with pytest.raises(DataError, match="class 'Dent' is not one of Blowhole"):
        resolve_dataset("magnetic-tile")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("gone.yaml", r"data=gone\.yaml: not found \(looked for the file .*gone\.yaml"),
        ("nue", "did you mean 'neu'"),
        ("steelsynth", "did you mean 'steel-synth'"),
        ("some/neu.yaml", "not found"),
        (".", "holds no data.yaml"),
    ],
)
def test_resolve_dataset__not_found(data: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        resolve_dataset(data)
    assert "\n" not in str(caught.value)


def test_resolve_dataset__empty_yaml(work: Path) -> None:
    (work / "mine.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"mine\.yaml: is empty"):
        resolve_dataset("mine.yaml")


def test_resolve_dataset__unwritable_root(work: Path) -> None:
    neu_published(work / "NEU-DET")
    (work / "datasets").write_text("a file where the folder should be")
    with pytest.raises(OutputError):
        resolve_dataset("neu")


def test_resolve_dataset__failed_conversion_leaves_nothing(work: Path) -> None:
    raw = neu_published(work / "NEU-DET", each=3)
    file = raw / "ANNOTATIONS/patches_2.xml"
    file.write_text(file.read_text().replace("patches", "patch"))
    with pytest.raises(DataError, match=r"class 'patch'.*did you mean 'patches'"):
        resolve_dataset("neu")
    assert not (work / "datasets/neu").exists()


def test_import__starts_without_torch() -> None:
    modules = "datasets, convert, check, contact_sheet, synthetic, splits, resplit, validate"
    heavy = "{'torch', 'ultralytics', 'matplotlib'}"
    code = f"import sys; from kd_yolo.data import {modules}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
