"""One summary beside the runs in MLflow and TensorBoard, when Ultralytics' settings have them on.

The single runs are ordinary Ultralytics trainings: its own callbacks log them. A tracker that fails is a warning, never
the end of a comparison.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER, SETTINGS

from kd_yolo.compare.report import CompareReport


def track(report: CompareReport, folder: Path, name: str) -> list[str]:
    """Log a report and return the names of the trackers that took it.

    Args:
        report: The report, its files written.
        folder: Folder of the report; TensorBoard's events go to ``folder/summary``.
        name: Name of the comparison: MLflow's experiment, as for its runs.
    """
    taken = []
    for tracker, log in (("mlflow", _to_mlflow), ("tensorboard", _to_tensorboard)):
        if SETTINGS.get(tracker) is not True:
            continue
        try:
            log(report, folder, name)
        except ImportError:
            continue  # on in the settings, as TensorBoard is by default, but not installed
        except Exception as error:  # a tracker talks to servers and file systems that are no business of ours
            LOGGER.warning(
                f"{tracker}: the summary was not logged ({str(error).splitlines()[0] if str(error) else error})"
            )
            continue
        taken.append(tracker)
    return taken


def scalars(report: CompareReport) -> dict[str, float]:
    """Return the report's figures by name: ``student/method/mAP50-95``, ``.../gain``, ``.../p_holm``."""
    found: dict[str, float] = {}
    for row in report.rows:
        place = f"{row.student}/{row.method}"
        for metric in row.values:
            found[f"{place}/{metric}"] = sum(row.values[metric]) / len(row.values[metric])
        if row.gain is not None:
            found[f"{place}/gain"] = row.gain.mean
            found[f"{place}/p_holm"] = row.gain.p_holm
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _to_mlflow(report: CompareReport, folder: Path, name: str) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_experiment(name)
    with mlflow.start_run(run_name=f"{name}-summary"):
        mlflow.log_params({key: str(value)[:250] for key, value in report.setting["shown"].items()})
        mlflow.log_metrics({key.replace("+", "_"): value for key, value in scalars(report).items()})
        for file in report.files:
            mlflow.log_artifact(str(folder / file))


def _to_tensorboard(report: CompareReport, folder: Path, name: str) -> None:
    tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(folder / "summary")) as writer:
        for key, value in scalars(report).items():
            writer.add_scalar(key, value)
        writer.add_text(name, report.to_markdown())
