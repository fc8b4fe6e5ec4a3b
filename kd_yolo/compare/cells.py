"""The single runs of a comparison: arguments, content address and folder of every cell.

All runs of a student get the same data, epochs, canvas, batch, augmentation and warm start, because they get the same
arguments; only method, teacher and seed differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_yolo.compare.identity import SHOWN, address_of, device_kind
from kd_yolo.compare.job import Job
from kd_yolo.compare.settings import STUDENT_OPTIONS, TEACHER_OPTIONS, CompareKeys
from kd_yolo.config import TrainConfig, split_train_keys, stock_keys
from kd_yolo.files import absolute, sha256
from kd_yolo.nn.student import StudentSpec
from kd_yolo.tasks.peer import pretrained_peer
from kd_yolo.tasks.preflight import check_class_names_kept, check_training_inputs, resolve_method, resolve_student
from kd_yolo.tasks.start import check_start, start_source
from kd_yolo.tasks.stock_defaults import finetuned_defaults, narrowed_defaults

TEACHER = "self-teacher"
NO_METHOD: dict[str, Any] = {"name": "none", "args": {}, "schedule": {}, "balance": None}


@dataclass(frozen=True)
class Cell:
    """One run's place in the comparison.

    Attributes:
        student: Label of the student.
        method: Label of the method.
        seed: Seed.
        fold: Fold, or None.
        job: The run.
        needs: Name of the run that trains its teacher, or None.
    """

    student: str
    method: str
    seed: int
    fold: int | None
    job: Job
    needs: str | None = None


@dataclass(frozen=True)
class Part:
    """A data set that runs train on: the whole one, or a fold."""

    fold: int | None
    file: Path
    fingerprint: str
    images: int


@dataclass(frozen=True)
class Pair:
    """A student and a method with given teachers: what has to fit together.

    Attributes:
        config: Keys of one of its runs.
        student: Structure and warm start.
        method: The method with all its arguments.
        jobs: Its runs.
    """

    config: TrainConfig
    student: StudentSpec
    method: Mapping[str, Any]
    jobs: list[Job]


class CellBuilder:
    """Makes cells; what is the same for all of a student is found once."""

    def __init__(
        self, keys: CompareKeys, common: Mapping[str, Any], parts: Sequence[Part], teachers: Sequence[Path]
    ) -> None:
        self.keys, self.common, self.parts = keys, common, parts
        self.files, self.hashes = list(teachers), [sha256(path) for path in teachers]
        self._starts: dict[str, dict[str, Any]] = {}
        self.pairs: list[Pair] = []
        self.teacher = keys.teacher if keys.teacher in {"self", "none"} else ",".join(map(str, teachers))

    def cells(self, label: str, model: str, methods: Mapping[str, str]) -> list[Cell]:
        """Return all cells of one student."""
        spec = self._checked(model)
        found: list[Cell] = []
        for method_label, method in methods.items():
            config, resolved = self._resolved(model, method)
            before = len(found)
            for part in self.parts:
                for seed in self.keys.seed_list:
                    found += self._cell(label, model, spec, part, seed, method_label, method, resolved)
            if self.hashes and resolved["name"] != "none":
                self.pairs.append(Pair(config, spec, resolved, [cell.job for cell in found[before:]]))
        return list({(one.method, one.seed, one.fold): one for one in found}.values())

    def _cell(
        self,
        label: str,
        model: str,
        spec: StudentSpec,
        part: Part,
        seed: int,
        method_label: str,
        method: str,
        resolved: Mapping[str, Any],
    ) -> list[Cell]:
        """Return a cell, after the cell of its own teacher where it has one."""
        place = (label, seed, part.fold)
        if resolved["name"] == "none":
            arguments = self._arguments(model, "none", "none", seed, part)
            if self.keys.control == "equal_total" and method_label == self.keys.baseline:
                arguments["epochs"] = 2 * int(self.common["epochs"])
            return [self._made(place, method_label, spec, NO_METHOD, arguments, part, None, None)]
        if self.teacher != "self":
            arguments = self._arguments(model, method, self.teacher, seed, part)
            return [self._made(place, method_label, spec, resolved, arguments, part, self.hashes, None)]
        plain = self._arguments(model, "none", "none", seed, part)
        teacher = self._made(place, TEACHER, spec, NO_METHOD, plain, part, None, None)
        arguments = self._arguments(model, method, str(teacher.job.checkpoint), seed, part)
        source = {"run": teacher.job.address}
        return [teacher, self._made(place, method_label, spec, resolved, arguments, part, source, teacher.job.name)]

    def _made(
        self,
        place: tuple[str, int, int | None],
        method_label: str,
        spec: StudentSpec,
        method: Mapping[str, Any],
        arguments: dict[str, Any],
        part: Part,
        teacher: Any,
        needs: str | None,
    ) -> Cell:
        student, seed, fold = place
        stock = {key: value for key, value in arguments.items() if key in stock_keys()}
        address = address_of(spec, method, stock, part.fingerprint, teacher, self.keys.options)
        # A run that only trains a teacher and an equal baseline are one run, so they need one name.
        shown = "none" if method["name"] == "none" else _slug(method_label)
        tail = "" if fold is None else f"-f{fold}"
        name = f"{_slug(student)}-{shown}-s{seed}{tail}-{address[:SHOWN]}"
        job = Job(
            name=name,
            address=address,
            folder=self.keys.home / "runs" / name,
            arguments=arguments,
            environment={"MLFLOW_EXPERIMENT_NAME": self.keys.name, "MLFLOW_RUN": name},
            labels={"student": student, "method": shown, "seed": seed, "fold": fold},
            images=part.images,
            threads=self.keys.threads or 1,
            gpus=int(device_kind(arguments["device"]) == "cuda"),
            retries=self.keys.retries,
        )
        return Cell(student, method_label, seed, fold, job, needs)

    def _arguments(self, model: str, method: str, teacher: str, seed: int, part: Part) -> dict[str, Any]:
        """Return the keys of ``kd-yolo train`` for one run."""
        names = STUDENT_OPTIONS if method == "none" else (*STUDENT_OPTIONS, *TEACHER_OPTIONS)
        options = {key: value for key, value in self.keys.options.items() if key in names}
        given: dict[str, Any] = {"data": str(part.file), "model": model, "teacher": teacher, "method": method}
        given |= self._start(model)
        if options.get("unlabeled"):
            options["unlabeled"] = str(Path(str(options["unlabeled"])).expanduser().absolute())
        return {**given, **options, **self.common, "seed": seed, "export": "none", "benchmark": False}

    def _start(self, model: str) -> dict[str, Any]:
        """Return the warm start of a student's runs, the same for all, and what its origin changes in their recipe."""
        if model not in self._starts:
            given: dict[str, Any] = {}
            if self.keys.pretrained is not True:
                given["pretrained"] = absolute(self.keys.pretrained) if self.keys.pretrained else False
            config = TrainConfig(data=str(self.parts[0].file), model=model, **given)
            spec = resolve_student(config)
            peer = pretrained_peer(config, spec, self.files)
            data = self.parts[0].file
            check_start(config, spec, self.files, peer, data, self.common)
            found = start_source(config, spec, self.files, peer)
            classes = self.common.get("classes")
            defaults = narrowed_defaults() if found else finetuned_defaults(spec, data, classes=classes)
            self._starts[model] = ({"pretrained": str(found[0])} if found else given) | defaults
        return self._starts[model]

    def _checked(self, model: str) -> StudentSpec:
        """Return a student's structure and warm start, with every argument of its runs checked."""
        arguments = self._arguments(model, "none", "none", self.keys.seed_list[0], self.parts[0])
        config, stock, _ = split_train_keys(arguments)
        spec = resolve_student(config)
        check_training_inputs(config, stock, self.parts[0].file, spec)
        return spec

    def _resolved(self, model: str, method: str) -> tuple[TrainConfig, dict[str, Any]]:
        """Return the keys of a run and its method with all arguments."""
        teacher = "self" if self.teacher == "none" else self.teacher
        given = self._arguments(model, method, "none" if method == "none" else teacher, 0, self.parts[0])
        config, stock, groups = split_train_keys(given)
        check_class_names_kept(config, stock)
        return config, resolve_method(config, groups, stock)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", text).strip("-.") or "run"
