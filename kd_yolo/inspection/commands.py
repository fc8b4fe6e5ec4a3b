"""``kd-yolo val`` and ``kd-yolo predict`` where the model, or a second one, is an anomaly model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_yolo.api import KDYOLO
from kd_yolo.errors import ConfigError
from kd_yolo.inspection.fusion import FusionPredictor, fusion_keys
from kd_yolo.inspection.predict import AnomalyPredictor, PredictKeys, anomaly_keys
from kd_yolo.inspection.validate import val_anomaly

Outcome = tuple[str, Any]


def val(values: Mapping[str, Any]) -> Outcome:
    """Judge an anomaly model.

    Raises:
        KDYoloError: Anything wrong with the input; one line.
    """
    if values.get("data") in (None, ""):
        raise ConfigError("val: missing key 'data'; give the anomaly data set, for example data=mvtec category=screw")
    rest = {key: value for key, value in values.items() if key not in {"model", "data"}}
    report = val_anomaly(str(values["model"]), str(values["data"]), **rest)
    return report.to_text(), report.to_dict()


def predict(values: Mapping[str, Any]) -> Outcome:
    """Inspect images with an anomaly model, with ``anomaly=`` beside a detector.

    Raises:
        KDYoloError: Anything wrong with the input; one line.
    """
    return _fused(values) if values.get("anomaly") not in (None, "") else _alone(values)


def _alone(values: Mapping[str, Any]) -> Outcome:
    predictor = AnomalyPredictor(anomaly_keys(PredictKeys, values, "predict"))
    images = [result.to_dict() for result in predictor]
    return predictor.summary(), {"save_dir": str(predictor.save_dir or ""), "images": images}


def _fused(values: Mapping[str, Any]) -> Outcome:
    keys = fusion_keys(values)
    predictor = FusionPredictor(keys, KDYOLO(keys.model, trust=keys.trust))
    images = [result.to_dict() for result in predictor]
    return predictor.report.to_text(), {**predictor.report.to_dict(), "images": images}
