"""The words of ``kd-yolo data``: check, convert, make, split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kd_yolo.config import Strict, validate
from kd_yolo.data.progress import stderr_progress

Outcome = tuple[str, Any]


class CheckKeys(Strict):
    """Keys of ``data check``."""

    data: str = Field(description="data set: YAML file or built-in name; give data=NAME")
    imgsz: int = Field(default=640, ge=1)
    out: str | None = None
    split: Literal["train", "val", "test"] = "train"
    count: int = Field(default=20, ge=1)
    seed: int = Field(default=0, ge=0)


class ConvertKeys(Strict):
    """Keys of ``data convert``."""

    from_: str = Field(alias="from", description="voc, masks, coco, deeppcb, classes or signals; give from=NAME")
    src: str = Field(description="folder with the published data; give src=FOLDER")
    out: str = Field(description="folder to write; give out=FOLDER")
    split: str = "auto"
    group: str | None = None
    seed: int = Field(default=0, ge=0)
    names: str | list[str] | None = None
    origin: Literal["auto", "0", "1"] | int = "auto"
    min_area: int = Field(default=10, ge=1)
    threshold: int = Field(default=127, ge=0, le=254)
    mode: Literal["copy", "link"] = "copy"


class MakeKeys(Strict):
    """Keys of ``data make``."""

    out: str = Field(description="folder to write; give out=FOLDER")
    train: int = Field(default=240, ge=1)
    val: int = Field(default=60, ge=1)
    test: int = Field(default=60, ge=1)
    seed: int = Field(default=0, ge=0)


class SplitKeys(Strict):
    """Keys of ``data split``."""

    data: str = Field(description="data set: YAML file or built-in name; give data=NAME")
    out: str = Field(description="folder to write; give out=FOLDER")
    split: str = "0.8/0.1/0.1"
    group: str | None = None
    seed: int = Field(default=0, ge=0)


def check(values: Mapping[str, Any]) -> Outcome:
    """Find every problem of a data set and draw a contact sheet."""
    keys = _keys(CheckKeys, values, "data check")
    from kd_yolo.data.check import check_dataset
    from kd_yolo.data.contact_sheet import draw_contact_sheet
    from kd_yolo.data.datasets import resolve_dataset

    yaml = resolve_dataset(keys.data)
    report = check_dataset(yaml, keys.imgsz, stderr_progress(f"{keys.data}: checking"))
    out = Path(keys.out or f"{Path(keys.data).stem}-{keys.split}.png")
    sheet = draw_contact_sheet(yaml, out, keys.split, keys.count, keys.seed)
    return f"{report.to_text()}\ncontact sheet: {sheet}", {**report.to_dict(), "contact_sheet": str(sheet)}


def convert(values: Mapping[str, Any]) -> Outcome:
    """Bring a published layout into YOLO form, or recordings into pictures."""
    if values.get("from") == "signals":
        return _convert_signals(values)
    if values.get("from") == "classes":
        from kd_yolo.classify.convert import convert_classes

        return convert_classes(values)
    keys = _keys(ConvertKeys, values, "data convert")
    from kd_yolo.data.convert import convert as run
    from kd_yolo.data.splits import parse_split

    names = keys.names.split(",") if isinstance(keys.names, str) else keys.names
    report = run(
        keys.from_,
        Path(keys.src).expanduser(),
        Path(keys.out).expanduser(),
        split=parse_split(keys.split, keys.seed, keys.group),
        names=names,
        origin=str(keys.origin),  # type: ignore[arg-type]  # checked by the converter, with its own message
        min_area=keys.min_area,
        threshold=keys.threshold,
        mode=keys.mode,
        progress=stderr_progress(f"{keys.src}: converting"),
    )
    return f"{report.to_text()}\nuse it with data={report.yaml}", report.to_dict()


def make(values: Mapping[str, Any]) -> Outcome:
    """Write the built-in synthetic set."""
    keys = _keys(MakeKeys, values, "data make")
    from kd_yolo.data.synthetic import make_steel_synth

    yaml = make_steel_synth(Path(keys.out).expanduser(), keys.train, keys.val, keys.test, keys.seed)
    content = {"yaml": str(yaml), "images": {"train": keys.train, "val": keys.val, "test": keys.test}}
    return f"{keys.train + keys.val + keys.test} images; use them with data={yaml}", content


def split(values: Mapping[str, Any]) -> Outcome:
    """Split a data set again, never separating identical images."""
    keys = _keys(SplitKeys, values, "data split")
    from kd_yolo.data.datasets import resolve_dataset
    from kd_yolo.data.resplit import make_split
    from kd_yolo.data.splits import parse_split

    spec = parse_split(keys.split, keys.seed, keys.group)
    yamls = make_split(resolve_dataset(keys.data), Path(keys.out).expanduser(), spec)
    lines = [f"use it with data={yaml}" for yaml in yamls]
    return "\n".join(lines), {"yamls": [str(yaml) for yaml in yamls]}


SUBCOMMANDS: dict[str, Callable[[Mapping[str, Any]], Outcome]] = {
    "check": check,
    "convert": convert,
    "make": make,
    "split": split,
}


def _convert_signals(values: Mapping[str, Any]) -> Outcome:
    from kd_yolo.data.signals import SignalsKeys
    from kd_yolo.data.signals_convert import convert_signals

    keys = _keys(SignalsKeys, values, "data convert from=signals")
    params = keys.model_dump(exclude={"from_", "src", "out"}, exclude_unset=True)  # unset keys may come from like=
    src, out = Path(keys.src).expanduser(), Path(keys.out).expanduser()
    report = convert_signals(src, out, progress=stderr_progress(f"{keys.src}: drawing"), **params)
    hint = "" if keys.like else f"\nuse it with task=classify data={report.out}"
    return f"{report.to_text()}{hint}", report.to_dict()


def _keys(schema: Any, values: Mapping[str, Any], command: str) -> Any:
    return validate(schema, values, where=command)
