"""The command line as a user meets it: help, listings, JSON output, bad values."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import kd_yolo
from kd_yolo import command_keys, commands, data_commands
from kd_yolo.classify.convert import ClassesKeys
from kd_yolo.cli import INTERRUPTED, main
from kd_yolo.command_table import COMMANDS
from kd_yolo.config import REPLACED_KEYS, TrainConfig, stock_keys
from kd_yolo.data.signals import SignalsKeys
from kd_yolo.resources import builtin_names

HEAVY = ("torch", "ultralytics", "cv2", "numpy", "matplotlib", "onnx", "onnxruntime")
HELP_CPU_S = 0.3

SCHEMAS: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "deploy": command_keys.DeployKeys,
    "export": command_keys.ExportKeys,
    "benchmark": command_keys.BenchmarkKeys,
}
DATA_SCHEMAS: dict[str, type[BaseModel]] = {
    "check": data_commands.CheckKeys,
    "convert": data_commands.ConvertKeys,
    "make": data_commands.MakeKeys,
    "split": data_commands.SplitKeys,
}
CONVERTERS: dict[str, type[BaseModel]] = {"from=signals": SignalsKeys, "from=classes": ClassesKeys}


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, as a shell does."""
    # Ultralytics puts its default folders elsewhere when it sees pytest's variable
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def one_object(stdout: str) -> dict[str, Any]:
    """Return the one JSON object that a command printed; NaN is no JSON and anything beside the object is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(stdout, parse_constant=refuse)
    assert isinstance(content, dict)
    assert stdout.count("\n") == 1
    return content


def keys_of(schema: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in schema.model_fields.items()}


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], []])
def test_help__overview_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", text, re.MULTILINE), name


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help__of_a_command_lists_its_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: kd-yolo {name}")
    for key, meaning in {**COMMANDS[name].keys, "json": ""}.items():
        assert re.search(rf"^  {re.escape(key)}(?: +{re.escape(meaning)}|\s)", text, re.MULTILINE), key
    if COMMANDS[name].stock:
        shown = set(text.partition("Ultralytics' own keys")[2].split())
        assert set(stock_keys()) - set(REPLACED_KEYS) - set(COMMANDS[name].keys) <= shown
        assert not set(REPLACED_KEYS) & shown


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_help__keys_are_those_that_the_command_takes(name: str) -> None:
    shown = {key for key in COMMANDS[name].keys if not key.endswith(".NAME")} - {"task"}  # it chooses the schema
    assert shown == keys_of(SCHEMAS[name])


@pytest.mark.parametrize("usage", COMMANDS["data"].keys)
def test_help__data_words_show_keys_that_they_take(usage: str) -> None:
    word, first, *_ = usage.split()
    schema = CONVERTERS.get(first) or DATA_SCHEMAS[word]
    shown = set(re.findall(r"(\w+)=", usage))
    assert shown <= keys_of(schema), f"data {word} does not take {shown - keys_of(schema)}"
    assert {field.alias or name for name, field in schema.model_fields.items() if field.is_required()} <= shown


def test_help__data_shows_every_word() -> None:
    words = [usage.split()[0] for usage in COMMANDS["data"].keys]
    assert set(words) == set(DATA_SCHEMAS) == set(data_commands.SUBCOMMANDS)


def test_help__demo_keys_reach_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_yolo import demo

    given: dict[str, Any] = {}
    monkeypatch.setattr(demo, "run_demo", lambda **keys: (given.update(keys) or "", {}))
    commands.demo({"project": "p", "epochs": 1, "model": "lightnet-n", "imgsz": 64})
    assert set(given) == set(COMMANDS["demo"].keys)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["trian"], ["train", "--help"], ["data", "check", "--help"], ["train", "epochs"]],
)
def test_help__imports_nothing_heavy(words: list[str]) -> None:
    code = "import sys; from kd_yolo.cli import main; main(sys.argv[1:]); print('LOADED', *sys.modules)"
    loaded = run("-c", code, *words).stdout.rpartition("LOADED")[2].split()
    assert "kd_yolo.cli" in loaded
    assert not {name.split(".")[0] for name in loaded} & set(HEAVY)


def test_training__is_ready_to_refuse_before_the_heaviest_is_loaded() -> None:
    """torchvision brings torch's compiler along, which takes as long as everything else together."""
    code = "import sys, kd_yolo.training, kd_yolo.api; print('LOADED', *sys.modules)"
    loaded = run("-c", code).stdout.rpartition("LOADED")[2].split()
    assert "torch" in loaded
    assert not {"torchvision", "torch._dynamo"} & set(loaded)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs os.wait4, which Windows lacks")
def test_help__is_fast() -> None:
    """Processor time, not wall time: the best of five stays the same on a machine that is busy with something else."""
    assert min(cpu_seconds("-m", "kd_yolo", "--help") for _ in range(5)) < HELP_CPU_S


def cpu_seconds(*words: str) -> float:
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


# ---- running ---------------------------------------------------------------------------------------------------------


def test_module__runs_as_the_script_does() -> None:
    done = run("-m", "kd_yolo", "version")
    assert done.stdout == f"kd-yolo {kd_yolo.__version__}\n"
    (script,) = entry_points(group="console_scripts", name="kd-yolo")
    assert script.load() is main


def test_module__bad_input_is_one_line_and_status_2() -> None:
    done = run("-m", "kd_yolo", "models", "sort=size")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kd-yolo: models: unknown key 'sort'")
    assert done.stderr.count("\n") == 1


def test_main__interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(values: Mapping[str, Any]) -> tuple[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", stop)
    assert main(["train", "data=steel-synth"]) == INTERRUPTED == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "resume=true" in captured.err


@pytest.mark.parametrize("word", ["epochs=many", "epochs=0", "imgsz=100", "model=lightnet-x"])
def test_demo__bad_value(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", f"project={tmp_path / 'runs'}", word]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kd-yolo: ")]
    assert len(lines) == 1
    assert word.partition("=")[2] in lines[0]
    assert not (tmp_path / "runs").exists()


def test_data__make_then_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kd_yolo.data.datayaml import load_data_yaml

    assert main(["data", "make", f"out={tmp_path / 'made'}", "train=8", "val=4", "test=4"]) == 0
    words = [f"data={tmp_path / 'made'}", f"out={tmp_path / 'again'}", "split=0.5/0.25/0.25", "json=true"]
    assert main(["data", "split", *words]) == 0, capsys.readouterr().err
    made, again = (load_data_yaml(tmp_path / name / "data.yaml") for name in ("made", "again"))
    assert sum(len(again.images(split)) for split in again.splits) == 16
    assert again.names == made.names
    assert main(["data", "check", f"data={tmp_path / 'again'}", f"out={tmp_path / 'sheet.png'}", "split=val"]) == 0


@pytest.mark.parametrize("name", ["models", "methods", "doctor"])
def test_json__listings(name: str, tmp_path: Path) -> None:
    done = run("-m", "kd_yolo", name, "json=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = one_object(done.stdout)
    if name == "doctor":
        assert content["healthy"], content
        assert {item["status"] for item in content["findings"]} <= {"ok", "missing"}
    else:
        listed = {row[name.removesuffix("s")] for row in content[name]}
        assert {word for word in listed if "+" not in word} == set(builtin_names(name))
    assert not any(tmp_path.iterdir()), "a listing left files in the working folder"


def test_json__data_check(tiny_data: Path, tmp_path: Path) -> None:
    done = run("-m", "kd_yolo", "data", "check", f"data={tiny_data}", "imgsz=64", "json=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = one_object(done.stdout)
    assert content["ok"] is True
    assert content["images"] == {"train": 24, "val": 8, "test": 8}
    assert (tmp_path / content["contact_sheet"]).is_file()


def test_json__val(tiny_teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = [f"model={tiny_teacher}", f"data={tiny_data}", "imgsz=64", "batch=8", "device=cpu", f"project={tmp_path}"]
    done = run("-m", "kd_yolo", "val", *words, "workers=0", "json=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = one_object(done.stdout)
    assert 0 <= content["metrics/mAP50-95(B)"] <= content["metrics/mAP50(B)"] <= 1


def test_json__predict(tiny_teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    source = tiny_data.parent / "images" / "val"
    words = [f"model={tiny_teacher}", f"source={source}", "imgsz=64", "conf=0.001", "device=cpu", f"project={tmp_path}"]
    done = run("-m", "kd_yolo", "predict", *words, "json=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = one_object(done.stdout)
    assert [Path(item["image"]).name for item in content["images"]] == sorted(path.name for path in source.iterdir())
    found = [detection for item in content["images"] for detection in item["detections"]]
    assert found, "a threshold of 0.001 lets something through"
    assert all(0.001 <= item["confidence"] <= 1 and len(item["box_xyxy_px"]) == 4 for item in found)
    assert Path(content["save_dir"]).is_relative_to(tmp_path)


def test_json__deploy(tiny_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.pt"
    done = run("-m", "kd_yolo", "deploy", f"model={tiny_teacher}", f"out={out}", "json=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = one_object(done.stdout)
    assert Path(content["path"]) == out
    assert out.is_file()
    assert content["merge"]["blocks"] > 0
    assert content["merge"]["relative_error"] <= content["merge"]["tolerance"]
    assert json.loads(out.with_suffix(".json").read_text()) == content


def test_train__refused_teacher_leaves_nothing(tiny_teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Judging the teacher is no reason to leave a folder of results behind."""
    words = [
        f"data={tiny_data}",
        "model=lightnet-n",
        f"teacher={tiny_teacher}",
        "imgsz=64",
        f"project={tmp_path / 'runs'}",
    ]
    done = run("-m", "kd_yolo", "train", *words, "device=cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "allow_weak_teacher=true" in done.stderr
    assert not any(tmp_path.iterdir()), sorted(str(path) for path in tmp_path.rglob("*"))
