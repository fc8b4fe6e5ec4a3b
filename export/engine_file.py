"""TensorRT engines, from the ONNX file that says every precision itself."""

from __future__ import annotations

from kd_yolo.export.onnx_file import make_onnx
from kd_yolo.export.onnx_graph import graph_metadata
from kd_yolo.export.stock import Made, Work, failures_in_one_line


def make_engine(work: Work) -> Made:
    """Make an engine: for the GPU of this machine, or with ``target`` for TensorRT for RTX without a GPU.

    TensorRT 11 is strongly typed, so float16 and int8 come from the graph (casts, Q/DQ) and not from builder flags.

    Raises:
        BackendMissingError: TensorRT is missing.
        ConfigError: TensorRT cannot build for that GPU.
        ExportError: The export or the build failed, or int8 costs more than ``max_drop``.
    """
    from kd_yolo.export.tensorrt_engine import build_engine

    job = work.job
    graph = make_onnx(work)
    engine = work.folder / f"{job.source.stem}.engine"
    with failures_in_one_line():
        metadata = graph_metadata(graph.path)
        built = build_engine(graph.path, engine, job.target, metadata, job.dynamic, job.batch, work.canvas)
    facts = {**graph.facts, "engine": built}
    if job.target is None or runs_here(str(job.target.compute_capability)):
        return Made(engine, facts, proven=engine, int8=graph.int8, graph=graph.path)
    checked = (
        "the ONNX graph it was built from; the engine itself runs only on a GPU of compute capability "
        f"{job.target.compute_capability}"
    )
    return Made(engine, facts, proven=graph.path, checked=checked, int8=graph.int8)


def runs_here(compute_capability: str) -> bool:
    """Return whether the first GPU, on which engines are proven, has a compute capability such as ``8.6``."""
    import torch

    if not torch.cuda.is_available():
        return False
    wanted = tuple(int(part) for part in compute_capability.split("."))
    return bool(torch.cuda.get_device_capability(0) == wanted)
