"""TorchScript files: the traced deployed model with the metadata inside the archive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from kd_yolo.export.stock import Made, Work, run_stock_exporter
from ultralytics.engine.exporter import Exporter, NMSModel

from kd_yolo.runtimes.base import METADATA_KEY


def make_torchscript(work: Work) -> Made:
    """Make a TorchScript file.

    Raises:
        ExportError: The export failed.
    """
    made, _, facts = trace_deployed(work)
    return Made(made, facts, proven=made)


def trace_deployed(work: Work) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Trace the deployed model into an archive, prepared by Ultralytics' exporter.

    The archive is made in memory, because PyTorch ends the whole process when a file that it writes itself finds no
    room.

    Returns:
        The file, Ultralytics' metadata, and facts about the graph.

    Raises:
        ExportError: The export failed.
    """
    metadata: dict[str, Any] = {}
    facts: dict[str, Any] = {}

    class InMemory(Exporter):
        """Ultralytics' exporter with a writer of ours."""

        def export_torchscript(self) -> str:
            model = NMSModel(self.model, self.args) if self.args.nms else self.model
            script: Any = torch.jit.trace(model, self.im, strict=False, check_trace=False)
            kinds = [node.kind() for node in script.inlined_graph.nodes()]
            facts.update(nodes=len(kinds), convolutions=kinds.count("aten::_convolution"))
            metadata.update(self.metadata)
            extra = {"config.txt": json.dumps({**self.metadata, METADATA_KEY: work.own})}  # Ultralytics' name for it
            path = Path(self.file).with_suffix(".torchscript")
            path.write_bytes(script.save_to_buffer(_extra_files=extra))
            return str(path)

    return run_stock_exporter(work, "torchscript", "fp32", exporter=InMemory), metadata, facts
