"""Edge bundles: a proven ONNX file in a folder with all that detecting with it needs."""

from __future__ import annotations

from kd_yolo.export.onnx_file import make_onnx
from kd_yolo.export.stock import Made, Work, failures_in_one_line

from kd_yolo.errors import ExportError


def make_bundle(work: Work) -> Made:
    """Make a bundle folder; the gate runs the ONNX file that lies in it.

    Raises:
        ExportError: The export failed, or int8 costs more than ``max_drop``.
    """
    from kd_yolo.export.bundle import write_bundle

    graph = make_onnx(work)
    folder = work.folder / "bundle"
    with failures_in_one_line():
        write_bundle(graph.path, folder)
        files = sorted(folder.glob("*.onnx"))
    if len(files) != 1:
        raise ExportError(f"export failed: the bundle holds {len(files)} ONNX files instead of one")
    return Made(folder, graph.facts, proven=files[0], checked=f"{files[0].name} in the folder", int8=graph.int8)
