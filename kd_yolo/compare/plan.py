"""From the keys of a comparison to its runs: every student with every method, seed and fold, on one budget.

All runs of a student get the same data, epochs, canvas, batch, augmentation and warm start, because they get the same
arguments; only method, teacher and seed differ. With ``teacher=self`` the teacher of a student and seed is a run of its
own, plain training of the same student, that all methods share; where the baseline is the very same run, it is one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_yolo.compare.cells import Cell, CellBuilder, Pair, Part
from kd_yolo.compare.folds import make_folds
from kd_yolo.compare.identity import SHOWN, data_fingerprint
from kd_yolo.compare.job import Job
from kd_yolo.compare.settings import CompareKeys, words
from kd_yolo.config import stock_keys
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.data.datayaml import load_data_yaml
from kd_yolo.errors import ConfigError, DataError, TeacherError
from kd_yolo.files import absolute
from kd_yolo.resources import load_yaml


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison.

    Attributes:
        cells: Runs that are compared, and those that only train a teacher (method ``self-teacher``).
        students: Labels in the order given.
        methods: Labels in the order given, the baseline first.
        data: Data YAML as resolved.
        imgsz: Canvas, pixels.
        epochs: Epochs of a student.
        batch: Images a batch.
        folds: Data YAML of each fold; empty without folds.
        stock: Stock arguments of every run, without the seed.
        teacher: What teaches, for the report.
        teacher_files: The teachers' files.
        fingerprint: Fingerprint of the data set.
        pairs: Students and methods that the given teachers must fit.
    """

    cells: list[Cell]
    students: list[str]
    methods: list[str]
    data: Path
    imgsz: int
    epochs: int
    batch: Any
    folds: list[Path]
    stock: dict[str, Any]
    teacher: str
    teacher_files: list[Path]
    fingerprint: str
    pairs: list[Pair]

    def waves(self) -> list[list[Job]]:
        """Return the runs, each once, those that train a teacher for others before the others."""
        jobs: dict[str, tuple[bool, Job]] = {}
        for cell in sorted(self.cells, key=lambda one: (one.seed, one.fold or 0)):  # whole pairs early
            jobs.setdefault(cell.job.name, (cell.needs is not None, cell.job))
        waves = [[job for later, job in jobs.values() if later is which] for which in (False, True)]
        return [wave for wave in waves if wave]


def plan(keys: CompareKeys, stock: Mapping[str, Any]) -> Plan:
    """Check everything and lay out the runs; nothing is trained.

    Args:
        keys: The comparison's keys.
        stock: Stock training arguments for every run.

    Raises:
        KDYoloError: Anything wrong with data, models, methods, teacher or arguments.
    """
    data = resolve_dataset(keys.data)
    if keys.test and "test" not in load_data_yaml(data).splits:
        raise DataError(f"{data}: has no 'test' split; drop test=true, or add one")
    common = common_arguments(keys, stock, load_yaml(data).get("imgsz", 640))
    students = labels([absolute(word) for word in keys.student_words], "students")
    methods = labels([method_word(word) for word in keys.method_words], "methods")
    files = teacher_files(keys)
    folds = _folds(keys, data)
    parts = [
        Part(number if folds else None, file, data_fingerprint(file), len(load_data_yaml(file).images("train")))
        for number, file in enumerate(folds or [data])
    ]
    builder = CellBuilder(keys, common, parts, files)
    cells = [cell for label, model in students.items() for cell in builder.cells(label, model, methods)]
    return Plan(
        cells,
        list(students),
        list(methods),
        data,
        common["imgsz"],
        int(common["epochs"]),
        common["batch"],
        folds,
        common,
        teacher_text(keys, files),
        files,
        data_fingerprint(data),
        builder.pairs,
    )


def cuda_devices(keys: CompareKeys) -> list[str]:
    """Return the CUDA numbers that runs are spread over; empty when they run on a CPU (or on Apple's ``mps``).

    Without ``device=`` these are all GPUs of this machine, or none; on a Ray cluster only what is asked for.

    Raises:
        ConfigError: An unknown device, or one that is not there.
    """
    asked = words(keys.device)
    count = torch.cuda.device_count() if keys.engine == "local" and torch.cuda.is_available() else 0
    if not asked or asked == ["cuda"]:
        if asked and keys.engine == "ray":
            return ["0"]
        if asked and not count:
            raise ConfigError("device=cuda: PyTorch sees no CUDA device; use device=cpu")
        return [str(number) for number in range(count)]
    if asked in (["cpu"], ["mps"]):
        return []
    for word in asked:
        if not word.isdigit():
            raise ConfigError(f"device={word}: unknown; use cpu, or CUDA numbers such as 0,1")
        if keys.engine == "local" and int(word) >= count:
            raise ConfigError(f"device={word}: PyTorch sees {count} CUDA devices; use device=cpu")
    return asked


def common_arguments(keys: CompareKeys, stock: Mapping[str, Any], canvas: Any) -> dict[str, Any]:
    """Return the stock arguments of every run, those that the report names filled in.

    Args:
        keys: The comparison's keys.
        stock: Stock arguments as given.
        canvas: The canvas in pixels when ``imgsz`` is not given.
    """
    defaults = stock_keys()
    named = {key: stock.get(key, defaults[key]) for key in ("epochs", "batch")}
    given = {key: value for key, value in stock.items() if key not in {"project", "name", "device"}}
    # One GPU a run: the engine chooses which one by CUDA_VISIBLE_DEVICES, and a run sees it as number 0.
    place: str | int = 0 if cuda_devices(keys) else "mps" if keys.device == "mps" else "cpu"
    return {"plots": False, **given, "imgsz": stock.get("imgsz", canvas), **named, "device": place}


def _folds(keys: CompareKeys, data: Path) -> list[Path]:
    if keys.folds is None:
        return []
    return make_folds(data, keys.folds, keys.home / "folds" / f"{keys.folds}-{data_fingerprint(data)[:SHOWN]}")


def teacher_files(keys: CompareKeys) -> list[Path]:
    """Return the teachers' files.

    Raises:
        TeacherError: One of them is not there.
    """
    if keys.teacher in {"self", "none"}:
        return []
    files = [Path(word.strip()).expanduser().absolute() for word in keys.teacher.split(",") if word.strip()]
    for file in files:
        if not file.exists():
            raise TeacherError(f"teacher={file}: no such file; give a trained checkpoint, self or none")
    return files


def file_label(file: Path) -> str:
    """Return what reports call a checkpoint: ``weights/best.pt`` says nothing without its run's name."""
    return f"{file.parent.parent.name}/{file.name}" if file.parent.name == "weights" else file.name


def teacher_text(keys: CompareKeys, files: Sequence[Path]) -> str:
    """Return what teaches, for the report."""
    return ", ".join(map(file_label, files)) if files else keys.teacher


def labels(given: Sequence[str], key: str) -> dict[str, str]:
    """Return short labels of models or methods, file names for files.

    Raises:
        ConfigError: One is given twice, or two files have one name.
    """
    found: dict[str, str] = {}
    for word in given:
        label = _label(Path(word)) if Path(word).suffix in {".pt", ".yaml", ".yml"} else word
        if label in found:
            how = "is given twice" if found[label] == word else f"and {found[label]} would have one name in the report"
            raise ConfigError(f"{key}={word}: {how}; keep one, or rename a file")
        found[label] = word
    return found


def _label(file: Path) -> str:
    return file.parent.parent.name if file.parent.name == "weights" else file.stem


def method_word(word: str) -> str:
    """Return a method file's absolute path; a name stays a name."""
    return absolute(word) if word.endswith((".yaml", ".yml")) else word
