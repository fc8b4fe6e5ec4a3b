"""How a comparison was measured, and what its reader must know: the lines under the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_yolo.compare.job import JobResult
from kd_yolo.compare.plan import Plan
from kd_yolo.compare.report import Row
from kd_yolo.compare.settings import CompareKeys

FEW_PAIRS = 3


def describe(
    laid: Plan,
    keys: CompareKeys,
    baseline: str,
    records: Sequence[Mapping[str, Any]],
    teachers: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Return the setting; ``shown`` is what the report prints, files by name only."""
    hidden = {"epochs", "batch", "imgsz", "plots", "device", "verbose"}
    extra = {key: value for key, value in laid.stock.items() if key not in hidden}
    warm = keys.pretrained if isinstance(keys.pretrained, bool) else keys.pretrained.replace("\\", "/").split("/")[-1]
    teacher = laid.teacher if any(name != "none" for name in laid.methods) else ""
    main = keys.kind.shown[0]
    reached = [f"{one[main]:.2f}" for one in teachers.values()]
    if teacher and reached:
        teacher += f" ({', '.join(reached)} {main} on val)"
    shown: dict[str, Any] = {
        "data": f"{_data_name(laid)} (val)",
        "imgsz": laid.imgsz,
        "epochs": laid.epochs,
        "batch": laid.batch,
        "seeds": ",".join(map(str, keys.seed_list)),
        **({"folds": keys.folds} if keys.folds else {}),
        "teacher": teacher,
        "warm start": {True: "the model's own", False: "none"}.get(warm, warm) if isinstance(warm, bool) else warm,
        **extra,
        **{name: _one(records, "versions", name) for name in ("kd_yolo", "ultralytics", "torch")},
        "machine": _machines(records),
    }
    return {
        "baseline": baseline,
        "metric": keys.metric,
        "confidence": keys.confidence,
        "min_gain": keys.min_gain,
        "control": keys.control,
        "students": laid.students,
        "methods": laid.methods,
        "seeds": keys.seed_list,
        "folds": keys.folds,
        "split": "val",
        "data": _data_name(laid),
        "data_fingerprint": laid.fingerprint,
        "teacher": laid.teacher,
        "teachers": {label: dict(figures) for label, figures in teachers.items()},
        "imgsz": laid.imgsz,
        "epochs": laid.epochs,
        "batch": laid.batch,
        "arguments": extra,
        "shown": {key: value for key, value in shown.items() if value not in (None, "")},
    }


def notes(
    laid: Plan,
    keys: CompareKeys,
    rows: Sequence[Row],
    records: Sequence[Mapping[str, Any]],
    teachers: Mapping[str, JobResult],
) -> list[str]:
    """Return what the reader must know to read the table rightly."""
    unit = "seed and fold" if keys.folds else "seed"
    found = [
        f"gain: points of {keys.metric} over {laid.methods[0]}, paired by {unit}; the best checkpoint of each run on "
        "validation; mean ± sd over runs. All runs of a student have one budget: same data, epochs, canvas, batch, "
        "augmentation and warm start",
        _rule(keys, sum(row.gain is not None and row.gain.pairs > 1 for row in rows)),
    ]
    least = min((row.gain.pairs for row in rows if row.gain is not None), default=FEW_PAIRS)
    if least == 1:
        found.append("WARNING: one pair has no spread: no verdict is possible; add seeds, the finished runs are kept")
    elif least < FEW_PAIRS:
        found.append("WARNING: two pairs make very wide intervals; add seeds, the finished runs are kept")
    if keys.folds:
        found.append("folds share training images: the t intervals carry Nadeau and Bengio's correction for that")
    elif rows:
        found.append("pairs differ by seed alone: what is told is told for this split of this data set")
    if any(sum(row.values[keys.metric]) < len(row.places) for row in rows):
        found.append("WARNING: a row is below 1 point: its runs have hardly learned anything; train longer")
    found += _teacher_notes(laid, keys, teachers)
    found += _cost_notes(records)
    return found


def _rule(keys: CompareKeys, comparisons: int) -> str:
    level = f"{100 * keys.confidence:g} %"
    alpha = 1 - keys.confidence
    return (
        f"verdict: helped = difference above 0, p at most {alpha:.3g} after Holm's correction for {comparisons} "
        f"comparison{'' if comparisons == 1 else 's'}; did not help = below 0 by the same rule, or a gain of "
        f"{keys.min_gain:g} points or more is excluded; else cannot tell, with the number of pairs that would tell the "
        f"gain seen, or {keys.min_gain:g} if that is more (power 0.8). Intervals: {level}, single; the bootstrap's are "
        "too narrow with few pairs and decide nothing"
    )


def _teacher_notes(laid: Plan, keys: CompareKeys, teachers: Mapping[str, JobResult]) -> list[str]:
    if keys.teacher != "self":
        return ["the cost of training the teacher is not in the table"] if laid.teacher_files else []
    costs = [one.record["cost"] for one in teachers.values() if one.status == "done"]
    each = "a student, fold and seed" if keys.folds else "a student and seed"
    hours = sum(cost["wall_s"] for cost in costs) / 3600
    text = (
        f"teacher=self: {len(teachers)} teachers of {laid.epochs} epochs, one {each}, "
        f"{hours:.2f} h in all, trained once and shared by the methods; not in the table's cost. "
    )
    if keys.control == "equal_total":
        return [text + f"control=equal_total: the baseline has these epochs too ({2 * laid.epochs})"]
    return [text + "The baseline does not have these epochs; control=equal_total gives them to it"]


def _cost_notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    if any(not record["cost"].get("complete", True) for record in records):
        found.append("WARNING: a run was killed together with its watcher; its hours are a lower bound")
    if any(record["cost"].get("cpu_s") is None for record in records):
        found.append("some runs were not started by this command: their hours are wall time, their memory is not known")
    names = {_machine(record) for record in records} - {""}
    if len(names) > 1:
        found.append("runs were made on different machines: compare their cost with care")
    if len({str(sorted(record["versions"].items())) for record in records if record.get("versions")}) > 1:
        found.append("WARNING: runs were made with different versions; see compare.json")
    return found


def _data_name(laid: Plan) -> str:
    file = laid.data
    return file.parent.name if file.stem in {"data", "dataset"} else file.stem


def _one(records: Sequence[Mapping[str, Any]], group: str, key: str) -> str:
    return ", ".join(sorted({str(record[group][key]) for record in records if key in (record.get(group) or {})}))


def _machines(records: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(sorted({_machine(record) for record in records} - {""}))


def _machine(record: Mapping[str, Any]) -> str:
    machine = record.get("machine") or {}
    if not machine:
        return ""
    threads = machine.get("threads")
    return f"{machine['cpu']}, {machine['cores']} cores, {threads} thread{'' if threads == 1 else 's'} a run"
