"""Comparisons of classifiers: their runs, the check of given teachers, and the verdict on the test split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_yolo.classify.checkpoints import load_classifier
from kd_yolo.classify.data import resolve_class_data
from kd_yolo.classify.folder import ClassFolder, read_class_folder
from kd_yolo.classify.model import check_same_order
from kd_yolo.classify.phases import validate_classifier
from kd_yolo.classify.preflight import CANVAS, check_stock, check_teacher
from kd_yolo.classify.settings import ClassifyConfig, resolve_method, split_classify_keys
from kd_yolo.classify.student import ClassifierSpec, resolve_classifier
from kd_yolo.compare.cells import CellBuilder, Part
from kd_yolo.compare.outcome import finished
from kd_yolo.compare.plan import Plan, common_arguments, file_label, labels, method_word, teacher_files, teacher_text
from kd_yolo.compare.settings import CompareKeys
from kd_yolo.compare.task import CLASSIFY
from kd_yolo.errors import ConfigError, DataError
from kd_yolo.files import absolute


class ClassifyCellBuilder(CellBuilder):
    """Makes the runs of classifiers; everything else is as for detectors."""

    def _arguments(self, model: str, method: str, teacher: str, seed: int, part: Part) -> dict[str, Any]:
        names = CLASSIFY.students if method == "none" else (*CLASSIFY.students, *CLASSIFY.teachers)
        options = {key: value for key, value in self.keys.options.items() if key in names}
        given: dict[str, Any] = {
            "task": "classify", "data": str(part.file), "model": model, "teacher": teacher, "method": method
        }  # fmt: skip
        if self.keys.pretrained is not True:
            given["pretrained"] = absolute(self.keys.pretrained) if self.keys.pretrained else False
        return {**given, **options, **self.common, "seed": seed}

    def _checked(self, model: str) -> ClassifierSpec:  # type: ignore[override]  # what is asked of it is the same
        arguments = self._arguments(model, "none", "none", self.keys.seed_list[0], self.parts[0])
        config, stock, _ = split_classify_keys(arguments)
        check_stock(stock, read_class_folder(self.parts[0].file))
        return resolve_classifier(config)

    def _resolved(self, model: str, method: str) -> tuple[ClassifyConfig, dict[str, Any]]:  # type: ignore[override]
        teacher = "self" if self.teacher == "none" else self.teacher
        given = self._arguments(model, method, "none" if method == "none" else teacher, 0, self.parts[0])
        config, stock, groups = split_classify_keys(given)
        return config, resolve_method(config, groups, stock)


def plan_classify(keys: CompareKeys, stock: Mapping[str, Any]) -> Plan:
    """Check everything and lay out the runs of a comparison of classifiers; nothing is trained.

    Args:
        keys: The comparison's keys.
        stock: Stock training arguments for every run.

    Raises:
        KDYoloError: Anything wrong with data, models, methods, teacher or arguments.
    """
    data = resolve_class_data(keys.data)
    folder = read_class_folder(data, check_images=True)
    if keys.metric == "top5" and len(folder.names) <= 5:
        raise ConfigError(f"metric=top5: is always 100 with {len(folder.names)} classes; use metric=top1")
    if keys.test and "test" not in folder.images:
        raise DataError(f"{data}: has no 'test' split; drop test=true, or add one")
    common = common_arguments(keys, stock, CANVAS)
    students = labels([absolute(word) for word in keys.student_words], "students")
    methods = labels([method_word(word) for word in keys.method_words], "methods")
    files = teacher_files(keys)
    fingerprint = class_fingerprint(folder)
    builder = ClassifyCellBuilder(keys, common, [Part(None, data, fingerprint, folder.count("train"))], files)
    return Plan(
        cells=[cell for label, model in students.items() for cell in builder.cells(label, model, methods)],
        students=list(students),
        methods=list(methods),
        data=data,
        imgsz=common["imgsz"],
        epochs=int(common["epochs"]),
        batch=common["batch"],
        folds=[],
        stock=common,
        teacher=teacher_text(keys, files),
        teacher_files=files,
        fingerprint=fingerprint,
        pairs=builder.pairs,
    )


def check_classify_teachers(laid: Plan, home: Path) -> dict[str, dict[str, float]]:
    """Return top-1 and top-5 of each given teacher by its label, on the validation split, in points.

    Raises:
        KDYoloError: A teacher does not fit the data, or is too weak, and a run with it is still to be done.
    """
    figures: dict[str, dict[str, float]] = {}
    names = read_class_folder(laid.data).names
    for file in laid.teacher_files:
        trust = any(bool(pair.config.trust) for pair in laid.pairs)
        model, _ = load_classifier(file, trust=trust)  # restricted, before Ultralytics loads it as it is
        check_same_order({int(key): str(name) for key, name in model.names.items()}, names, file)
        found = judge_classifier(file, laid.data, "val", laid.imgsz, "cpu")
        figures[file_label(file)] = {name: 100 * float(found[name]) for name in CLASSIFY.shown}
        for pair in laid.pairs:
            if not all(finished(job.folder, job.address) for job in pair.jobs):
                config: Any = pair.config
                check_teacher(config, file, laid.data, laid.imgsz, top1=float(found["top1"]))
    return figures


def judge_classifier(path: Path, data: Path, split: str, imgsz: int, device: str = "cpu") -> dict[str, Any]:
    """Return top-1 and top-5 of a checkpoint on a split, 0 to 1, and the number of its images."""
    found = validate_classifier(path, data, imgsz, split, device)
    figures = {name: found[key] for name, key in CLASSIFY.figures.items()}
    return {**figures, "images": read_class_folder(data).count(split)}


def class_fingerprint(folder: ClassFolder) -> str:
    """Return a digest of what a classification folder trains and validates on, wherever it lies.

    Class names, and names and sizes of the images of train and val.
    """
    digest = hashlib.sha256(json.dumps(list(folder.names.values())).encode())
    for split in ("train", "val"):
        for name, files in sorted(folder.images[split].items()):
            for image in files:
                digest.update(f"{split}\t{name}\t{image.name}\t{image.stat().st_size}\n".encode())
    return digest.hexdigest()
