"""Commands that only tell: models, methods, targets, and what works on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_yolo.config import refuse_unknown

Outcome = tuple[str, Any]


def models(values: Mapping[str, Any]) -> Outcome:
    """List the built-in models."""
    refuse_unknown(values, [], "models")
    from kd_yolo.nn.lightnet import build_model, count_deployed
    from kd_yolo.resources import builtin_names

    rows = []
    for name in builtin_names("models"):
        model = build_model(name, nc=6)
        counts = count_deployed(model, imgsz=224)
        trained = sum(p.numel() for p in model.parameters())
        rows.append({"model": name, "params_training": trained, **counts})
    lines = [
        f"{row['model']:<12} {row['params'] / 1e6:7.2f} M {row['convolutions']:9} {row['gflops']:12.2f} "
        f"{row['params_training'] / 1e6:10.2f} M"
        for row in rows
    ]
    head = f"{'model':<12} {'deployed':>9} {'convs':>9} {'GFLOPs@224':>12} {'in training':>12}"
    others = {f"task={task}": builtin_names(f"models/{task}") for task in ("anomaly", "classify")}
    notes = ["6 classes. Any Ultralytics detector works too: model=yolo26n.pt reparam=qarep"]
    notes += [f"{task}: {', '.join(names)}" for task, names in others.items()]
    return "\n".join([head, *lines, "", *notes]), {"models": rows, **others}


def methods(values: Mapping[str, Any]) -> Outcome:
    """List the distillation methods with what they cost and whether they helped, as measured."""
    refuse_unknown(values, [], "methods")
    import inspect

    from kd_yolo.distill.base import list_methods, load_method
    from kd_yolo.measured import measured_methods
    from kd_yolo.resources import builtin_names

    rows: list[dict[str, Any]] = [{"method": "none", "summary": "No distillation: labels only.", "args": {}}]
    for name in list_methods():
        method = load_method(name)
        fields = {key: field.default for key, field in method.Args.model_fields.items()}
        summary = (inspect.getdoc(inspect.getmodule(method)) or "").splitlines()[0]
        rows.append({"method": name, "summary": summary, "args": fields})
    measured = measured_methods()
    combined = sorted({item.method for item in measured.methods if "+" in item.method})
    rows += [{"method": name, "summary": "A combination of these.", "args": {}} for name in combined]
    lines = []
    for row in rows:
        found = measured.of(row["method"])
        row["measured"] = [item.model_dump() for item in found]
        lines.append(f"{row['method']:<14} {row['summary']}")
        lines += [" " * 15 + item.one_line() for item in found]
        if row["args"]:
            lines.append(" " * 15 + ", ".join(f"kd.{key}={value}" for key, value in row["args"].items()))
    settings = {"gain": measured.gain_setting, "cost": measured.cost_setting}
    notes = [f"{name}: {text}" for name, text in settings.items()]
    classify = builtin_names("methods/classify")
    notes.append(f"task=classify: {', '.join(classify)}")
    return "\n".join([*lines, "", *notes]), {"methods": rows, "setting": settings, "task=classify": classify}


def targets(values: Mapping[str, Any]) -> Outcome:
    """List the processors that engines are built for and latencies are estimated for."""
    refuse_unknown(values, [], "targets")
    from kd_yolo.bench.targets_table import targets_table

    return targets_table()


def doctor(values: Mapping[str, Any]) -> Outcome:
    """Check the environment."""
    refuse_unknown(values, [], "doctor")
    from kd_yolo.doctor import examine

    report = examine()
    return report.to_text(), report.to_dict()
