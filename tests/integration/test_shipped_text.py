"""What ships as text: every YAML is valid, and every documented command line would be understood."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from kd_yolo import data_commands
from kd_yolo.classify.convert import ClassesKeys
from kd_yolo.cli import command_help
from kd_yolo.command_table import COMMANDS, TASK_CONFIGS
from kd_yolo.compare.settings import split_compare_keys
from kd_yolo.config import REPLACED_KEYS, parse_pairs, split_train_keys, stock_keys
from kd_yolo.data.signals import SignalsKeys
from kd_yolo.errors import ConfigError
from kd_yolo.measured import measured_methods
from kd_yolo.resources import builtin_root, find
from kd_yolo.tasks.stock_defaults import narrowed_defaults

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
YAMLS = sorted(builtin_root().rglob("*.yaml"))
DATA_SCHEMAS: dict[str, type[BaseModel]] = {
    "check": data_commands.CheckKeys,
    "convert": data_commands.ConvertKeys,
    "make": data_commands.MakeKeys,
    "split": data_commands.SplitKeys,
}
CONVERTERS: dict[str, type[BaseModel]] = {"from=signals": SignalsKeys, "from=classes": ClassesKeys}


# ---- shipped YAML ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAMLS, ids=[path.relative_to(builtin_root()).as_posix() for path in YAMLS])
def test_yaml__every_shipped_file_is_valid(path: Path) -> None:
    kind = path.parent.relative_to(builtin_root()).as_posix()
    if kind == "measured":
        assert measured_methods().methods
        return
    if kind == "train":
        assert set(narrowed_defaults()) <= set(stock_keys())
        return
    if "/" not in kind:
        assert find(kind, path.stem) == path
    {
        "models": check_model,
        "models/anomaly": check_anomaly_model,
        "models/classify": check_classifier,
        "methods": check_method,
        "methods/classify": check_classify_method,
        "datasets": check_dataset,
        "datasets/anomaly": check_anomaly_dataset,
        "targets": check_target,
    }[kind](path)


def check_anomaly_model(path: Path) -> None:
    from kd_yolo.anomaly.spec import load_spec, preset_names

    assert load_spec(path.stem) == load_spec(path)
    assert path.stem in preset_names()


def check_anomaly_dataset(path: Path) -> None:
    from kd_yolo.anomaly.layouts import describe_anomaly_datasets

    assert describe_anomaly_datasets()[path.stem]


def check_classifier(path: Path) -> None:
    from ultralytics.nn.modules import Classify

    from kd_yolo.classify.student import build_classifier, model_dictionary

    head = build_classifier(model_dictionary(path.stem), nc=3).model[-1]
    assert type(head) is Classify
    assert head.linear.out_features == 3


def check_classify_method(path: Path) -> None:
    from kd_yolo.classify.methods import list_methods, parse_args
    from kd_yolo.config import MethodFile, validate
    from kd_yolo.distill.schedule import Schedule
    from kd_yolo.resources import load_yaml

    method = validate(MethodFile, load_yaml(path), where=str(path))
    assert method.name == path.stem
    assert validate(Schedule, method.schedule, where=str(path)).active_epochs(epochs=100, close_mosaic=0) >= 1
    if method.name != "none":
        assert method.name in list_methods()
        assert parse_args(method.name, method.args) == parse_args(method.name, {})


def check_model(path: Path) -> None:
    from ultralytics.nn.modules import Detect

    from kd_yolo.nn.lightnet import build_model

    model = build_model(path.stem, nc=3)
    head = model.model[-1]
    assert type(head) is Detect
    assert head.nc == 3
    assert [int(stride) for stride in model.stride] == [8, 16, 32]


def check_method(path: Path) -> None:
    from kd_yolo.config import MethodFile, validate
    from kd_yolo.distill.base import load_method, parse_args
    from kd_yolo.distill.schedule import Schedule
    from kd_yolo.resources import load_yaml

    content = load_yaml(path)
    method = validate(MethodFile, content, where=str(path))
    assert method.name == path.stem
    schedule = validate(Schedule, method.schedule, where=str(path))
    assert schedule.active_epochs(epochs=100, close_mosaic=10) >= 1
    if method.name == "none":
        assert content == {"name": "none"}
        return
    # A file that leaves a value out would change silently with the code's defaults; one that differs would lie.
    assert set(method.args) == set(load_method(method.name).Args.model_fields)
    assert parse_args(method.name, method.args) == parse_args(method.name, {})


def check_target(path: Path) -> None:
    from kd_yolo.targets import load_target

    assert load_target(path).name == path.stem


def check_dataset(path: Path) -> None:
    from kd_yolo.data.datasets import load_builtin

    spec = load_builtin(path)
    assert (spec.raw is None) != (spec.make is None)
    assert sorted(spec.names) == list(range(len(spec.names)))
    assert spec.title
    assert spec.origin


# ---- documented commands ---------------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[str]:
    """Yield the lines of fenced blocks that start with ``kd-yolo``, continued ones joined; not those with ``...``."""
    fence = ""
    joined = ""
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and (not fence or line.strip() == fence):
            fence = "" if fence else mark.group(1)
            continue
        if not fence:
            continue
        joined += line.strip().removeprefix("$ ")
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        if joined.startswith("kd-yolo ") and "..." not in joined:
            yield joined
        joined = ""


def check_line(line: str) -> None:
    """Refuse a command line whose command, word or key does not exist.

    Raises:
        ConfigError: As the command line itself would say it.
    """
    program, name, *words = shlex.split(line, comments=True)
    assert program == "kd-yolo"
    if name in {"--help", "--version"}:
        return
    if name not in COMMANDS:
        raise ConfigError(f"unknown command '{name}'")
    if "--help" in words:
        return
    schema: type[BaseModel] | None = None
    if name == "data":
        word = words.pop(0)
        if word not in DATA_SCHEMAS:
            raise ConfigError(f"unknown word '{word}'")
        schema = next((CONVERTERS[one] for one in words if one in CONVERTERS), DATA_SCHEMAS[word])
    values = parse_pairs(words)
    values.pop("json", None)
    if name == "train":
        check_train(values)
        return
    if name == "compare":
        split_compare_keys(values)
        return
    known = _keys(schema) if schema else {*COMMANDS[name].keys, *(stock_keys() if COMMANDS[name].stock else ())}
    for key in values:
        if key not in known or (key in REPLACED_KEYS and key not in COMMANDS[name].keys):
            raise ConfigError(f"{name}: unknown key '{key}'")


def check_train(values: Mapping[str, Any]) -> None:
    from kd_yolo.distill.base import list_methods
    from kd_yolo.tasks.preflight import resolve_method

    if not values.get("data") and not values.get("resume"):
        raise ConfigError("train needs data=")
    if values.get("task") in {"anomaly", "classify"}:
        check_other_task({"data": "resumed", **values})
        return
    config, stock, groups = split_train_keys({"data": "resumed", **values})
    if config.method in {*list_methods(), "none"}:
        resolve_method(config, groups, stock)


def check_other_task(values: Mapping[str, Any]) -> None:
    from kd_yolo.anomaly.settings import split_anomaly_keys
    from kd_yolo.anomaly.spec import load_spec
    from kd_yolo.classify.methods import list_methods
    from kd_yolo.classify.settings import resolve_method, split_classify_keys

    if values["task"] == "anomaly":
        config, _, overrides = split_anomaly_keys(values)
        load_spec(config.model, overrides)
        return
    chosen, stock, groups = split_classify_keys(values)
    if chosen.method_name in {*list_methods(), "none"}:
        resolve_method(chosen, groups, stock)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.example])
def test_help__examples_parse(name: str) -> None:
    check_line(COMMANDS[name].example)


@pytest.mark.parametrize("task", TASK_CONFIGS)
def test_help__examples_of_tasks_parse_and_name_their_keys(task: str) -> None:
    check_line(TASK_CONFIGS[task].example)
    text = command_help("train", task)
    assert f"usage: kd-yolo train task={task}" in text
    assert "  data " in text
    assert "  teacher " in text


@pytest.mark.parametrize("page", PAGES)
def test_docs__every_command_line_parses(page: str) -> None:
    for line in command_lines((ROOT / page).read_text(encoding="utf-8")):
        try:
            check_line(line)
        except ConfigError as error:
            pytest.fail(f"{page}: {line}: {error}")


def test_docs__show_every_command() -> None:
    """Guards the test above: it would pass on pages in which no command is found."""
    assert list(command_lines((ROOT / "README.md").read_text(encoding="utf-8"))), "README.md shows no command"
    shown = {line.split()[1] for page in PAGES for line in command_lines((ROOT / page).read_text(encoding="utf-8"))}
    assert set(COMMANDS) <= shown


@pytest.mark.parametrize(
    "line",
    [
        "kd-yolo trian data=steel-synth",
        "kd-yolo train data=steel-synth imgzs=64",
        "kd-yolo train data=steel-synth kd.tua=2",
        "kd-yolo train data=steel-synth schedule.warmpu=0.1",
        "kd-yolo train model=lightnet-n",
        "kd-yolo train task=anomaly data=mvtec mosaic=1",
        "kd-yolo train task=anomaly data=mvtec kd.fuze=mean",
        "kd-yolo train task=anomaly data=mvtec model=hkp",
        "kd-yolo train task=classify data=neu teacher=t.pt kd.tua=2",
        "kd-yolo data convert from=signals src=a out=b window=0.1",
        "kd-yolo data convert from=classes src=a out=b min_area=3",
        "kd-yolo predict model=det.pt anomoly=hkt.pt source=photos",
        "kd-yolo train data=steel-synth distill_model=t.pt",
        "kd-yolo val model=best.pt data=neu task=segment",
        "kd-yolo deploy model=best.pt imgsz=64",
        "kd-yolo data chekc data=neu",
        "kd-yolo data split data=neu out=x ratio=0.5",
        "kd-yolo models sort=size",
    ],
)
def test_check_line__twins_that_are_wrong(line: str) -> None:
    with pytest.raises(ConfigError):
        check_line(line)


def test_command_lines__fences_continuations_and_omissions() -> None:
    text = (
        "kd-yolo outside a=1\n```bash\n$ kd-yolo val a=1 \\\n    b=2\nkd-yolo train ... c=3\npip install kd-yolo\n```\n"
        "~~~\nkd-yolo doctor\n~~~\n"
    )
    assert list(command_lines(text)) == ["kd-yolo val a=1 b=2", "kd-yolo doctor"]


def _keys(schema: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in schema.model_fields.items()}
