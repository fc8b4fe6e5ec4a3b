"""Check, finish and describe ONNX graphs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from kd_yolo.export.job import QUANTIZE

from kd_yolo.errors import ExportError
from kd_yolo.runtimes.base import METADATA_KEY


def finish_graph(path: Path, own: dict[str, Any], precision: str) -> dict[str, Any]:
    """Check a graph, add our metadata to Ultralytics', and return facts about it.

    Args:
        path: The file; rewritten.
        own: Our metadata entry.
        precision: ``fp32``, ``fp16`` or ``int8``.

    Raises:
        ExportError: It is not a valid graph.
    """
    import onnx

    graph = onnx.load(path)
    sort_nodes(graph.graph)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    arguments = ast.literal_eval(metadata.get("args", "{}")) | {"quantize": QUANTIZE[precision]}
    metadata |= {"args": str(arguments), METADATA_KEY: json.dumps(own)}
    del graph.metadata_props[:]
    for key, value in metadata.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value
    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # checker and shape inference raise classes of their own
        raise ExportError(f"{path.name}: not a valid ONNX graph ({str(error).splitlines()[0][:200]})") from error
    onnx.save(graph, path)
    opset = next(item.version for item in graph.opset_import if item.domain in {"", "ai.onnx"})
    kinds = [node.op_type for node in graph.graph.node]
    return {"opset": int(opset), "nodes": len(kinds), "convolutions": kinds.count("Conv")}


def graph_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of an ONNX file as plain data: Ultralytics' values read as Python literals, ours as JSON."""
    import onnx

    found: dict[str, Any] = {}
    for entry in onnx.load(path, load_external_data=False).metadata_props:
        if entry.key == METADATA_KEY:
            found[entry.key] = json.loads(entry.value)
            continue
        try:
            found[entry.key] = ast.literal_eval(entry.value)
        except (ValueError, SyntaxError):
            found[entry.key] = entry.value
    return found


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
