"""The keys of a comparison, checked once; what is not its own key is a training argument that every run gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from kd_yolo.compare.task import DETECT, TASKS, CompareTask, TaskName
from kd_yolo.config import REPLACED_KEYS, Strict, TrainConfig, stock_keys, validate
from kd_yolo.errors import ConfigError, nearest

# Keys of kd-yolo train that every run gets; the second group means something only where there is a teacher.
STUDENT_OPTIONS, TEACHER_OPTIONS = DETECT.students, DETECT.teachers
REPLACED = {key: text for key, text in REPLACED_KEYS.items() if key != "task"}
DECIDED = {
    "seed": "give seeds=0,1,2",
    "model": "give students=A,B",
    "method": "give methods=none,A,B",
    "resume": "the same command goes on where it was stopped",
    "exist_ok": "the same command goes on where it was stopped; for a fresh comparison give another name=",
    "chain": "compare single students; a chain has its own control",
    "generations": "compare single rounds; a student's file can be the next comparison's teacher",
    "teacher_model": "train that teacher first and give teacher=FILE",
    "teacher_epochs": "train that teacher first and give teacher=FILE",
    "export": "comparisons export nothing; export the run you choose",
    "benchmark": "comparisons time training only; benchmark the run you choose",
    "time": "it would make budgets unequal; give epochs=",
}


class CompareKeys(Strict):
    """Keys of ``kd-yolo compare``; ``options`` holds keys of ``kd-yolo train`` for every run."""

    task: TaskName = Field(default="detect", description="what the students do: detect or classify")
    data: str = Field(min_length=1, description="data set; give data=neu or data=FILE")
    students: str | list[str] = Field(description="models, as model= of train; give students=A,B")
    methods: str | list[str] = Field(
        default="none,kd-lightnet", description="methods by name, combination or YAML file"
    )
    teacher: str = Field(default="none", min_length=1, description="a file (several with commas), self, or none")
    seeds: str | int | list[int] = Field(default="0,1,2", description="seeds, the pairs of the comparison")
    folds: int | None = Field(default=None, ge=2, le=50, description="k of k-fold over train and val together")
    pretrained: bool | str = Field(default=True, description="warm start of every run")
    control: Literal["equal_student", "equal_total"] = Field(
        default="equal_student", description="the baseline's epochs"
    )
    baseline: str = Field(default="none", min_length=1, description="the method that all others are compared with")
    metric: Literal["mAP50-95", "mAP50", "top1", "top5"] = "mAP50-95"
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    min_gain: float = Field(default=0.5, ge=0, le=100, description="smallest gain that matters, in points")
    split: str = Field(default="val", description="split that choices are made on")
    test: bool = False
    test_methods: str | list[str] | None = None
    engine: Literal["local", "ray"] = "local"
    address: str = Field(default="auto", min_length=1, description="address of the Ray cluster")
    jobs: int | None = Field(default=None, ge=1, description="runs at once")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of a run")
    device: str | int | list[int] | None = None
    retries: int = Field(default=1, ge=0, le=10, description="how often a crashed run is taken up again")
    project: str = Field(default="runs", min_length=1)
    name: str = Field(default="compare", min_length=1)
    out: str | None = Field(default=None, min_length=1, description="folder of the report; default: project/name")
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("data", "teacher", "pretrained", "project", "out", mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("options")
    @classmethod
    def _known_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key not in (*STUDENT_OPTIONS, *TEACHER_OPTIONS):
                raise ValueError(f"'{key}' is no option of a comparison's runs")
        return value

    @property
    def kind(self) -> CompareTask:
        """Return the task with what differs between tasks."""
        return TASKS[self.task]

    @property
    def student_words(self) -> list[str]:
        """Return the students as given."""
        return words(self.students)

    @property
    def method_words(self) -> list[str]:
        """Return the methods as given, the baseline first and once."""
        return list(dict.fromkeys([self.baseline, *words(self.methods)]))

    @property
    def seed_list(self) -> list[int]:
        """Return the seeds in ascending order.

        Raises:
            ConfigError: Not whole numbers of at least 0, or one given twice.
        """
        texts = words(self.seeds)
        if not texts or not all(text.isdigit() for text in texts):
            raise ConfigError(f"seeds={','.join(texts)}: whole numbers are needed, for example seeds=0,1,2")
        seeds = sorted(int(text) for text in texts)
        if len(set(seeds)) < len(seeds):
            raise ConfigError(f"seeds={','.join(texts)}: a seed is given twice; the same run is no second pair")
        return seeds

    @property
    def home(self) -> Path:
        """Return the absolute folder of the comparison."""
        return (Path(self.project).expanduser() / self.name).absolute()


def split_compare_keys(values: Mapping[str, Any]) -> tuple[CompareKeys, dict[str, Any]]:
    """Split what the user gave into the comparison's keys and stock training arguments.

    Raises:
        ConfigError: An unknown key (the nearest is named), one that a comparison decides itself, or a wrong value.
    """
    task = TASKS.get(values.get("task", "detect"))
    if task is None:
        raise ConfigError(f"task={values['task']}: comparisons are made of {' and '.join(TASKS)}")
    own: dict[str, Any] = {} if task is DETECT else {"metric": task.shown[0], "methods": "none,hflkd"}
    stock: dict[str, Any] = {}
    options: dict[str, Any] = {}
    known_options = (*task.students, *task.teachers)
    fields = [key for key in CompareKeys.model_fields if key != "options"]
    for key, value in values.items():
        if key.startswith(("kd.", "schedule.")):
            raise ConfigError(
                f"'{key}' would hold for one method only: put it into a YAML file of that method and give "
                "methods=none,my-method.yaml"
            )
        if key in DECIDED or key in REPLACED:
            raise ConfigError(f"'{key}' is not used here: {DECIDED.get(key) or REPLACED[key]}")
        if key in fields:
            own[key] = value
        elif key in known_options:
            options[key] = value
        elif key in stock_keys():
            stock[key] = value
        else:
            known = [*fields, *known_options, *stock_keys()]
            raise ConfigError(f"unknown key '{key}'{nearest(key, known)} (kd-yolo compare --help lists all)")
    _refuse_numbers_as_names(own)
    keys = validate(CompareKeys, {**own, "options": options}, where="compare")
    check_keys(keys)
    return keys, stock


def check_keys(keys: CompareKeys) -> None:
    """Refuse what is wrong between keys.

    Raises:
        ConfigError: As said; one line.
    """
    if not keys.student_words:
        raise ConfigError("students=: at least one model is needed, for example students=lightnet-n")
    if keys.split != "val":
        raise ConfigError(
            f"split={keys.split}: choices are made on val; the test split is judged once, at the end, with "
            "test=true test_methods=METHOD"
        )
    if keys.test_methods is not None and not keys.test:
        raise ConfigError("test_methods: has no effect without test=true")
    distilled = [name for name in keys.method_words if name != "none"]
    if distilled and keys.teacher == "none":
        raise ConfigError(f"methods={distilled[0]}: needs a teacher; give teacher=FILE or teacher=self")
    if keys.control == "equal_total" and keys.teacher != "self":
        raise ConfigError("control=equal_total: is for teacher=self, where the teacher's epochs are known")
    if keys.control == "equal_total" and keys.baseline != "none":
        raise ConfigError("control=equal_total: the baseline must be none, which then gets the teacher's epochs too")
    slashes = {"/", "\\"} & set(keys.name)
    if slashes or keys.name in {".", ".."}:
        raise ConfigError(f"name={keys.name}: a plain folder name is needed; the place goes into project=")
    _check_task(keys)
    keys.seed_list  # noqa: B018 - refuses wrong seeds


def words(value: str | int | list[Any] | None) -> list[str]:
    """Return the words of ``a,b``, ``[a, b]`` or a single one."""
    if value is None:
        return []
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _check_task(keys: CompareKeys) -> None:
    """Refuse what the task does not have: another task's metric or options, folds of classification folders."""
    if keys.metric not in keys.kind.shown:
        raise ConfigError(f"metric={keys.metric}: task={keys.task} has {' and '.join(keys.kind.shown)}")
    if keys.task == "classify" and keys.folds is not None:
        raise ConfigError("folds: task=classify is compared over seeds on its own split; drop folds=")
    if keys.task == "classify" and "," in keys.teacher:
        raise ConfigError(f"teacher={keys.teacher}: a classifier has one teacher; give one file")
    given: dict[str, Any] = {key: value for key, value in keys.options.items() if value is not None}
    if keys.task == "detect":
        validate(TrainConfig, {"data": keys.data, **given}, where="compare")
        return
    from kd_yolo.classify.settings import ClassifyConfig

    validate(ClassifyConfig, {"data": keys.data, **given}, where="compare")


def _refuse_numbers_as_names(own: dict[str, Any]) -> None:
    """Turn what the command line read as a number back into the name that it is."""
    for key in ("data", "students", "methods", "teacher", "project", "name", "out", "baseline"):
        if isinstance(own.get(key), (int, float)) and not isinstance(own[key], bool):
            own[key] = str(own[key])
    if own.get("teacher") is None:
        own.pop("teacher", None)
