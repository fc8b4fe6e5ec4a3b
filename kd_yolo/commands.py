"""What each command does: parse its keys, call the library, return text for people and data for ``json=true``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_yolo.command_keys import BenchmarkKeys, DemoKeys, DeployKeys, ExportKeys
from kd_yolo.config import refuse_unknown, split_train_keys, stock_keys, validate
from kd_yolo.errors import ConfigError, DistillationError, nearest

Outcome = tuple[str, Any]


def train(values: Mapping[str, Any]) -> Outcome:
    """Train, deploy, export and time; other tasks than detection have handlers of their own."""
    task = values.get("task") or _task_of_run(values.get("resume"))
    if task not in TRAINERS:
        raise ConfigError(f"task={task}: not known{nearest(str(task), TRAINERS)} (known: {', '.join(TRAINERS)})")
    return TRAINERS[task]({key: value for key, value in values.items() if key != "task"})


def _train_detector(values: Mapping[str, Any]) -> Outcome:
    if not values.get("data") and not values.get("resume"):
        raise ConfigError("train needs data=; try data=steel-synth (built in) or data=neu.yaml")
    config, stock, groups = split_train_keys({"data": "resumed", **values})
    from kd_yolo.training import train as run

    report = run(config, stock, groups)
    lines = [f"{p.name}: mAP50 {_map50(p.metrics):.4f}, mAP50-95 {p.fitness:.4f}" for p in report.phases]
    files = [f"{kind}: {path}" for kind, path in report.artifacts.items()]
    return "\n".join(["", *lines, f"best student: {report.best}", *files]), report.to_dict()


def _train_anomaly(values: Mapping[str, Any]) -> Outcome:
    if not values.get("data") and not values.get("resume"):
        raise ConfigError("train task=anomaly needs data=; try data=surface-synth (built in) or data=mvtec")
    from kd_yolo.anomaly.settings import split_anomaly_keys

    config, stock, overrides = split_anomaly_keys({"data": "resumed", **values})
    from kd_yolo.tasks.anomaly_run import train_anomaly

    report = train_anomaly(config, stock, overrides)
    files = [f"{name}: {one['best']}" for name, one in report.results.items()]
    return "\n".join(["", report.to_markdown(), "", *files]), report.to_dict()


def _train_classifier(values: Mapping[str, Any]) -> Outcome:
    if not values.get("data") and not values.get("resume"):
        raise ConfigError("train task=classify needs data=; try data=knock-synth (built in), data=neu or a folder")
    from kd_yolo.classify.settings import split_classify_keys

    config, stock, groups = split_classify_keys({"data": "resumed", **values})
    from kd_yolo.classify.run import train_classify

    report = train_classify(config, stock, groups)
    return report.to_text(), report.to_dict()


def val(values: Mapping[str, Any]) -> Outcome:
    """Validate a checkpoint or an exported file."""
    if _is_anomaly_model(values):
        from kd_yolo.inspection.commands import val as run

        return run(values)
    if _is_classifier(values):
        from kd_yolo.classify.using import val as run

        return run(values)
    model, rest = _model_and_rest(values, "val", needs="data")
    metrics = model.val(**rest)
    content = {"model": str(values["model"]), **{k: float(v) for k, v in metrics.results_dict.items()}}
    per_class = {metrics.names[int(c)]: float(metrics.box.maps[int(c)]) for c in metrics.box.ap_class_index}
    text = f"mAP50 {content['metrics/mAP50(B)']:.4f}, mAP50-95 {content['metrics/mAP50-95(B)']:.4f}"
    return text, {**content, "mAP50-95_by_class": per_class}


def predict(values: Mapping[str, Any]) -> Outcome:
    """Detect in images, or inspect them with an anomaly model."""
    if values.get("anomaly") not in (None, "") or _is_anomaly_model(values):
        from kd_yolo.inspection.commands import predict as run

        return run(values)
    if _is_classifier(values):
        from kd_yolo.classify.using import predict as run

        return run(values)
    model, rest = _model_and_rest(values, "predict", needs="source")
    source = rest.pop("source")
    if isinstance(source, str) and "://" not in source and "*" not in source and not Path(source).exists():
        raise ConfigError(f"source={source}: no such file or folder")
    rest = {"save": True, "project": str(Path("runs/detect").resolve()), "name": "predict", **rest}
    found = []
    for result in model.predict(source, stream=True, **rest):
        boxes = result.boxes.cpu().numpy()
        detections = [
            {"class": result.names[int(c)], "confidence": float(p), "box_xyxy_px": [float(v) for v in xyxy]}
            for c, p, xyxy in zip(boxes.cls, boxes.conf, boxes.xyxy, strict=True)
        ]
        found.append({"image": str(result.path), "detections": detections})
    save_dir = str(getattr(model.predictor, "save_dir", ""))
    count = sum(len(item["detections"]) for item in found)
    return f"{count} detections in {len(found)} images; saved in {save_dir}", {"save_dir": save_dir, "images": found}


def deploy(values: Mapping[str, Any]) -> Outcome:
    """Write the merged checkpoint."""
    keys = _keys(DeployKeys, values, "deploy")
    from kd_yolo.anomaly.checkpoint import is_anomaly
    from kd_yolo.classify.checkpoints import is_classifier

    if is_anomaly(keys.model):
        raise ConfigError(f"model={keys.model}: is an anomaly model, which export merges; use kd-yolo export")
    if is_classifier(keys.model):
        from kd_yolo.classify.deploy import deploy_classifier

        if not keys.nms:
            raise ConfigError("nms=false: a classifier has no NMS; leave nms out")
        merged = deploy_classifier(keys.model, out=keys.out, trust=keys.trust)
        return merged.to_text(), merged.to_dict()
    from kd_yolo.deploy import deploy as run

    report = run(Path(keys.model), out=Path(keys.out) if keys.out else None, nms=keys.nms, trust=keys.trust)
    return report.to_text(), report.to_dict()


def export(values: Mapping[str, Any]) -> Outcome:
    """Export to another runtime, with the parity gate."""
    keys = _keys(ExportKeys, values, "export")
    from kd_yolo.anomaly.checkpoint import is_anomaly
    from kd_yolo.export import export as run

    given = keys.model_dump(exclude={"model", "format", "data", "out"}, exclude_none=True)
    data = _data(keys.data, is_anomaly(keys.model))
    out = Path(keys.out) if keys.out else None
    report = run(Path(keys.model), format=keys.format, data=data, out=out, **given)
    return report.to_text(), report.to_dict()


def benchmark(values: Mapping[str, Any]) -> Outcome:
    """Time and judge several files."""
    keys = _keys(BenchmarkKeys, values, "benchmark")
    from kd_yolo.bench import benchmark as run
    from kd_yolo.bench.runners import parse_choice
    from kd_yolo.runtimes.anomaly_session import is_anomaly_file

    given = keys.model_dump(exclude={"model", "data", "out", "device", "targets"}, exclude_none=True)
    models = _words(keys.model)
    given |= {"targets": _words(keys.targets)} if keys.targets else {}
    data = _data(keys.data, any(is_anomaly_file(parse_choice(one).path) for one in models))
    out = Path(keys.out) if keys.out else None
    report = run(models, data=data, out=out, device=str(keys.device), **given)
    return report.to_markdown(), report.to_dict()


def compare(values: Mapping[str, Any]) -> Outcome:
    """Say whether distillation helped, over seeds."""
    for key in ("data", "students"):
        if values.get(key) in (None, ""):
            raise ConfigError(f"compare: missing key '{key}'; see kd-yolo compare --help")
    from kd_yolo.compare.settings import split_compare_keys

    keys, stock = split_compare_keys(values)
    from kd_yolo.compare.run import compare as run

    report = run(keys, stock)
    if line := report.failure_line():
        print(report.to_markdown(), file=sys.stderr)
        raise DistillationError(line)
    return report.to_markdown(), report.to_dict()


def data(*arguments: Any) -> Outcome:
    """Run a ``data`` subcommand."""
    from kd_yolo.data_commands import SUBCOMMANDS

    if len(arguments) == 1:
        raise ConfigError(f"data needs a word: {', '.join(SUBCOMMANDS)}; for example data check data=steel-synth")
    name, values = arguments
    if name not in SUBCOMMANDS:
        raise ConfigError(f"data: unknown word '{name}'{nearest(name, SUBCOMMANDS)} (known: {', '.join(SUBCOMMANDS)})")
    return SUBCOMMANDS[name](values)


def demo(values: Mapping[str, Any]) -> Outcome:
    """Run the whole line on the built-in data."""
    keys = validate(DemoKeys, values, where="demo")
    from kd_yolo.demo import run_demo

    return run_demo(**keys.model_dump(exclude_none=True))


def _keys(schema: Any, values: Mapping[str, Any], command: str) -> Any:
    """Validate a command's keys; a name that reads like a number stays a name."""
    as_given = (bool, int, list, type(None))
    numbers = {key for key, field in schema.model_fields.items() if field.annotation is float}
    plain = {k: v if k in numbers or isinstance(v, as_given) else str(v) for k, v in values.items()}
    return validate(schema, plain, where=command)


def _data(data: str | None, anomaly: bool) -> str | None:
    """Return what ``data=`` stands for; anomaly data is resolved where its category is known."""
    if data is None or anomaly:
        return data
    from kd_yolo.data.datasets import resolve_dataset

    return str(resolve_dataset(data))


def _words(value: str | list[str] | None) -> list[str]:
    """Return the words of ``a,b`` or ``[a, b]``."""
    return [str(v) for v in value] if isinstance(value, list) else [v.strip() for v in (value or "").split(",") if v]


def _model_and_rest(values: Mapping[str, Any], command: str, needs: str) -> tuple[Any, dict[str, Any]]:
    refuse_unknown(values, ["model", "data", "source", "trust", *stock_keys()], command)
    for key in ("model", needs):
        if values.get(key) in (None, ""):
            raise ConfigError(f"{command}: missing key '{key}'; see kd-yolo {command} --help")
    from kd_yolo.api import KDYOLO

    trust = values.get("trust", False)
    if not isinstance(trust, bool):
        raise ConfigError(f"trust={trust}: true or false")
    rest = {key: value for key, value in values.items() if key not in {"model", "trust", "mode", "task"}}
    return KDYOLO(str(values["model"]), trust=trust), rest


def _is_anomaly_model(values: Mapping[str, Any]) -> bool:
    """Return whether ``model=`` is an anomaly model or the folder of a run that left some."""
    if values.get("model") in (None, ""):
        return False
    from kd_yolo.inspection.origin import is_anomaly_model

    return is_anomaly_model(str(values["model"]))


def _is_classifier(values: Mapping[str, Any]) -> bool:
    if values.get("model") in (None, ""):
        return False
    from kd_yolo.classify.checkpoints import is_classifier

    return is_classifier(str(values["model"]))


def _task_of_run(resume: Any) -> str:
    """Return the task of the run that ``resume=FOLDER`` names; detection where nothing says otherwise."""
    if not isinstance(resume, str):
        return "detect"
    from kd_yolo.resources import load_yaml

    path = Path(resume).expanduser().absolute()
    plan = next((folder / "run.yaml" for folder in (path, *path.parents[:3]) if (folder / "run.yaml").is_file()), None)
    return str(load_yaml(plan).get("task", "detect")) if plan else "detect"


def _map50(metrics: Mapping[str, float]) -> float:
    return float(metrics.get("metrics/mAP50(B)", float("nan")))


TRAINERS = {"detect": _train_detector, "anomaly": _train_anomaly, "classify": _train_classifier}
"""What ``train`` does for each ``task=``."""

__all__ = [
    "TRAINERS",
    "benchmark",
    "compare",
    "data",
    "demo",
    "deploy",
    "export",
    "predict",
    "train",
    "val",
]
