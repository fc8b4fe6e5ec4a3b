"""``kd-yolo val`` and ``kd-yolo predict`` with a classifier's checkpoint: Ultralytics' own, after a restricted load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.data.utils import VID_FORMATS

from kd_yolo.classify.checkpoints import load_classifier
from kd_yolo.classify.data import resolve_class_data
from kd_yolo.classify.folder import read_class_folder
from kd_yolo.config import refuse_unknown, stock_keys
from kd_yolo.data.layout import IMAGE_SUFFIXES
from kd_yolo.data.signals_read import SIGNAL_SUFFIXES
from kd_yolo.errors import ConfigError, DataError

VIDEO_SUFFIXES = {f".{suffix}" for suffix in VID_FORMATS}
Outcome = tuple[str, Any]


def val(values: Mapping[str, Any]) -> Outcome:
    """Judge a classifier.

    Raises:
        KDYoloError: A wrong key, a checkpoint that cannot be loaded, or data with other classes.
    """
    model, rest = _opened(values, "val", needs="data")
    data = resolve_class_data(str(rest.pop("data")))
    folder = read_class_folder(data)
    names = [str(name) for name in model.names.values()]
    if list(folder.names.values()) != names:
        raise DataError(
            f"{data}: its classes are {', '.join(folder.names.values())}; the model's are {', '.join(names)}"
        )
    split = str(rest.get("split") or "val")
    if split not in folder.images:
        raise DataError(f"split={split}: {data} has {', '.join(folder.images)}")
    with _one_line("val"):
        metrics = model.val(data=str(data), **{"plots": False, **rest})
    content = {"model": str(values["model"]), "split": split, "top1": float(metrics.top1), "top5": float(metrics.top5)}
    return f"top-1 {content['top1']:.4f}, top-5 {content['top5']:.4f}", content


def predict(values: Mapping[str, Any]) -> Outcome:
    """Classify images.

    Raises:
        KDYoloError: A wrong key, a missing source, or a checkpoint that cannot be loaded.
    """
    model, rest = _opened(values, "predict", needs="source")
    source = rest.pop("source")
    if isinstance(source, str) and "://" not in source and "*" not in source and not Path(source).exists():
        raise ConfigError(f"source={source}: no such file or folder")
    _check_pictures(source)
    rest = {"save": True, "project": str(Path("runs/classify").resolve()), "name": "predict", **rest}
    found = []
    with _one_line("predict"):
        for result in model.predict(source, stream=True, **rest):
            best = [int(number) for number in result.probs.top5]
            top = [{"class": result.names[number], "confidence": float(result.probs.data[number])} for number in best]
            found.append({"image": str(result.path), "class": top[0]["class"], "top": top})
    save_dir = str(getattr(model.predictor, "save_dir", ""))
    return f"{len(found)} images; saved in {save_dir}", {"save_dir": save_dir, "images": found}


def _check_pictures(source: Any) -> None:
    """Refuse recordings and folders without a picture directly in them."""
    path = Path(str(source))
    inside = [one for one in path.iterdir() if one.is_file()] if path.is_dir() else [path]
    sounds = [one for one in inside if one.suffix.lower() in SIGNAL_SUFFIXES]
    nothing = path.is_dir() and not any(one.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES for one in inside)
    if sounds and (nothing or path.is_file()):
        raise ConfigError(
            f"source={source}: recordings are drawn first, as those of the training were: kd-yolo data convert "
            f"from=signals src={path if path.is_dir() else path.parent} out=FOLDER like=DATA/signals.yaml"
        )
    if nothing:
        raise ConfigError(f"source={source}: no picture directly in this folder; name the folder that holds them")


@contextlib.contextmanager
def _one_line(command: str) -> Iterator[None]:
    """Turn what Ultralytics raises of a wrong value into one line."""
    try:
        yield
    except (FileNotFoundError, ValueError, TypeError, SyntaxError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{command}: {line}") from error


def _opened(values: Mapping[str, Any], command: str, needs: str) -> tuple[YOLO, dict[str, Any]]:
    """Return the model, loaded by Ultralytics once it is known to hold nothing foreign, and the other keys."""
    refuse_unknown(values, ["model", "data", "source", "trust", *stock_keys()], command)
    if values.get(needs) in (None, ""):
        raise ConfigError(f"{command}: missing key '{needs}'; see kd-yolo {command} --help")
    trust = values.get("trust", False)
    if not isinstance(trust, bool):
        raise ConfigError(f"trust={trust}: true or false")
    load_classifier(str(values["model"]), trust=trust)
    rest = {key: value for key, value in values.items() if key not in {"model", "trust", "mode", "task"}}
    return YOLO(str(values["model"]), task="classify"), rest
