"""Graphs of anomaly models: one input ``images`` in [0, 1], one output ``output0``, the final map."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import ultralytics
from kd_yolo.export.job import Job
from kd_yolo.export.onnx_graph import finish_graph, graph_metadata
from kd_yolo.export.openvino_model import graph_facts
from kd_yolo.export.sidecar import write_sidecar
from kd_yolo.export.stock import Made, failures_in_one_line, quiet
from ultralytics.utils.export.engine import best_onnx_opset

from kd_yolo.anomaly.model import AnomalyModel
from kd_yolo.runtimes.telemetry import no_telemetry

LEAST_OPSET = 11  # bilinear Resize with half-pixel centres
IR_VERSION = 10  # newest that ONNX Runtime releases in use read; Ultralytics' limit
AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class AnomalyWork:
    """One export under way.

    Attributes:
        job: Checked arguments.
        model: The deployed form, float32.
        folder: Temporary folder; everything in it is deleted.
        canvas: Height and width in pixels.
        own: Our metadata entry.
    """

    job: Job
    model: AnomalyModel
    folder: Path
    canvas: tuple[int, int]
    own: dict[str, Any]


def make_anomaly_onnx(work: AnomalyWork) -> Made:
    """Make an ONNX file.

    Raises:
        ExportError: The export failed, or the graph is not valid.
    """
    import onnx

    job = work.job
    path = work.folder / f"{job.source.stem}.onnx"
    opset = job.opset or best_onnx_opset(onnx)
    with failures_in_one_line():
        with quiet(), torch.no_grad():
            torch.onnx.export(
                work.model,
                (torch.zeros(job.batch, 3, *work.canvas),),
                str(path),
                opset_version=opset,
                input_names=["images"],
                output_names=["output0"],
                dynamic_axes={"images": AXES, "output0": AXES} if job.dynamic else None,
                dynamo=False,
            )
            graph = onnx.load(path)
            if job.simplify:
                import onnxslim

                graph = onnxslim.slim(graph)
        for key, value in metadata_of(work, opset).items():
            entry = graph.metadata_props.add()
            entry.key, entry.value = key, str(value)
        graph.ir_version = min(graph.ir_version, IR_VERSION)
        onnx.save(graph, path)
        facts = finish_graph(path, work.own, job.precision)
    return Made(path, facts, proven=path)


def make_anomaly_openvino(work: AnomalyWork) -> Made:
    """Make an OpenVINO folder from the ONNX file, float32.

    Raises:
        ExportError: The export failed.
    """
    graph = make_anomaly_onnx(work)
    folder = work.folder / f"{work.job.source.stem}_openvino_model"
    with failures_in_one_line():
        with no_telemetry():
            import openvino

            model = openvino.convert_model(graph.path)
        told = work.own["anomaly"]
        info = {
            "model_type": "kd-yolo anomaly",
            "labels": list(work.model.names.values()),
            "reverse_input_channels": True,
            "scale_values": [255.0],
            "resize_type": "standard",
            **{key: told[key] for key in ("threshold_image", "threshold_pixel", "score_min", "score_max", "score")},
        }
        for key, value in info.items():
            model.set_rt_info(value, ["model_info", key])
        folder.mkdir()
        openvino.save_model(model, folder / f"{work.job.source.stem}.xml", compress_to_fp16=False)
        write_sidecar(folder, metadata_of(work, graph.facts["opset"]), work.own, work.job.precision)
        facts = graph_facts(next(folder.glob("*.xml")))
    return Made(folder, facts, proven=folder)


def make_anomaly_engine(work: AnomalyWork) -> Made:
    """Make an engine from the ONNX file, as ``kd_yolo.export.engine_file.make_engine`` does.

    Raises:
        BackendMissingError: TensorRT is missing.
        ConfigError: TensorRT cannot build for that GPU.
        ExportError: The export or the build failed.
    """
    from kd_yolo.export.engine_file import runs_here
    from kd_yolo.export.tensorrt_engine import build_engine

    job = work.job
    graph = make_anomaly_onnx(work)
    engine = work.folder / f"{job.source.stem}.engine"
    with failures_in_one_line():
        metadata = graph_metadata(graph.path)
        built = build_engine(graph.path, engine, job.target, metadata, job.dynamic, job.batch, work.canvas)
    facts = {**graph.facts, "engine": built}
    if job.target is None or runs_here(str(job.target.compute_capability)):
        return Made(engine, facts, proven=engine, graph=graph.path)
    checked = (
        "the ONNX graph it was built from; the engine itself runs only on a GPU of compute capability "
        f"{job.target.compute_capability}"
    )
    return Made(engine, facts, proven=graph.path, checked=checked)


def make_anomaly_bundle(work: AnomalyWork) -> Made:
    """Make a bundle folder; the gate runs the ONNX file that lies in it.

    Raises:
        ExportError: The export failed.
    """
    from kd_yolo.export.anomaly_bundle import MODEL, write_anomaly_bundle

    graph = make_anomaly_onnx(work)
    folder = work.folder / "bundle"
    with failures_in_one_line():
        write_anomaly_bundle(graph.path, folder)
    return Made(folder, graph.facts, proven=folder / MODEL, checked=f"{MODEL} in the folder")


def metadata_of(work: AnomalyWork, opset: int) -> dict[str, Any]:
    """Return what Ultralytics' exporter would write about a model, for its own readers."""
    job = work.job
    return {
        "description": f"kd-yolo anomaly model {json.dumps(work.own['anomaly']['taps'])}",
        "author": "kd-yolo",
        "date": datetime.datetime.now().astimezone().isoformat(),
        "version": ultralytics.__version__,
        "license": "AGPL-3.0-only",
        "stride": work.model.stride,
        "task": work.model.task,
        "head": "Anomaly",
        "batch": job.batch,
        "imgsz": list(work.canvas),
        "names": dict(work.model.names),
        "args": {"batch": job.batch, "dynamic": job.dynamic, "opset": opset, "simplify": job.simplify, "nms": False},
        "channels": 3,
        "end2end": False,
    }
