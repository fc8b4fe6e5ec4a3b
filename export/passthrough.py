"""Formats that only Ultralytics' exporter knows: deployed, exported by it, unproven because nothing here runs it."""

from __future__ import annotations

from kd_yolo.export.stock import Made, Work, run_stock_exporter


def make_passthrough(work: Work) -> Made:
    """Make whatever Ultralytics makes of the deployed checkpoint.

    Raises:
        ExportError: The export failed.
    """
    job = work.job
    extra = {
        key: value
        for key, value in (("opset", job.opset), ("simplify", job.simplify), ("data", job.data))
        if key in job.format.keys and value is not None
    }
    made = run_stock_exporter(work, job.format.name, job.precision, **extra)
    return Made(made, {}, proven=None, checked=f"not checked: no runtime here for {job.format.name}")
