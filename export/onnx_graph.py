"""Run, check and describe ONNX files."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from kd_yolo.export.parity import Session
from torch import Tensor

import kd_yolo
from kd_yolo.errors import BackendMissingError, ExportError

NEEDED = ("onnx", "onnxruntime", "onnxslim")
METADATA_KEY = "kd_yolo"


def require_packages() -> None:
    """Check before Ultralytics does, which would install what it misses."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendMissingError(f"ONNX export needs {', '.join(missing)}; run: pip install 'kd-yolo[onnx]'")


def open_session(path: Path, threads: int | None = None) -> Session:
    """Open an ONNX file with ONNX Runtime on the CPU.

    Returns:
        A function from (B, C, H, W) float32 pixels to the graph's one output.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch runs between two calls
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes share no public base
        raise ExportError(f"{path.name}: ONNX Runtime cannot open it ({str(error).splitlines()[0][:200]})") from error
    name = session.get_inputs()[0].name

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: pixels.contiguous().numpy()})[0])

    return run


def finish_graph(path: Path, provenance: dict[str, Any]) -> dict[str, int]:
    """Check a graph, add our metadata to Ultralytics', and return facts about it."""
    import onnx

    graph = onnx.load(path)
    sort_nodes(graph.graph)
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps({"version": kd_yolo.__version__, **provenance}, default=str)
    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # checker and shape inference raise classes of their own
        raise ExportError(f"{path.name}: not a valid ONNX graph ({str(error).splitlines()[0][:200]})") from error
    onnx.save(graph, path)
    opset = next(item.version for item in graph.opset_import if item.domain in {"", "ai.onnx"})
    kinds = [node.op_type for node in graph.graph.node]
    return {"opset": int(opset), "nodes": len(kinds), "convolutions": kinds.count("Conv")}


def sort_nodes(graph: Any) -> None:
    """Put the nodes of a graph in the order that ONNX demands: each after what it reads.

    The float16 converter of ONNX Runtime appends its casts at the end, which its own loader forgives and others do not.
    """
    made = {name for node in graph.node for name in node.output}
    waiting, ordered, known = list(graph.node), [], {""}
    while waiting:
        ready = []
        for node in waiting:
            if all(name in known or name not in made for name in _reads(node)):
                ready.append(node)
                known.update(node.output)
        if not ready:
            raise ExportError("the exported graph has a cycle; please report this with the model")
        taken = {id(node) for node in ready}
        ordered += ready
        waiting = [node for node in waiting if id(node) not in taken]
    nodes = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(nodes)


def _reads(node: Any) -> list[str]:
    """Return the names that a node reads, those of its subgraphs included."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for inner in graph.node:
                names += _reads(inner)
    return names


def backend_versions() -> dict[str, str]:
    """Return the versions of the packages that make, simplify and run ONNX files."""
    return {name: str(importlib.import_module(name).__version__) for name in NEEDED}
