"""ncnn folders: pnnx converts the traced deployed model.

Ultralytics' own ncnn exporter pins one old pnnx and asks pip for it, and runs the Python file that pnnx generates; here
the installed pnnx is called on the TorchScript file as a program, and the parity gate says whether its result is right.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from kd_yolo.export.sidecar import write_sidecar
from kd_yolo.export.stock import Made, Work, failures_in_one_line
from kd_yolo.export.torchscript_file import trace_deployed

from kd_yolo.errors import ExportError

SECONDS = 600


def make_ncnn(work: Work) -> Made:
    """Make an ncnn folder: ``model.ncnn.param``, ``model.ncnn.bin`` and the metadata.

    Raises:
        ExportError: The export failed.
    """
    traced, metadata, _ = trace_deployed(work)
    folder = work.folder / "ncnn_model"
    with failures_in_one_line():
        folder.mkdir()
        _convert(work, traced, folder)
        write_sidecar(folder, metadata, work.own, work.job.precision)
        facts = _facts(folder / "model.ncnn.param")
    return Made(folder, facts, proven=folder)


def _convert(work: Work, traced: Path, folder: Path) -> None:
    """Run pnnx in the temporary folder, where its intermediate files stay."""
    import pnnx

    height, width = work.canvas
    channels = next(work.deployed.parameters()).shape[1]
    words = [
        pnnx.EXEC_PATH,
        str(traced),
        f"inputshape=[1,{channels},{height},{width}]f32",
        "device=cpu",
        f"fp16={int(work.job.precision == 'fp16')}",
        f"ncnnparam={folder / 'model.ncnn.param'}",
        f"ncnnbin={folder / 'model.ncnn.bin'}",
        *(
            f"{key}={work.folder / name}"
            for key, name in (
                ("ncnnpy", "model_ncnn.py"),
                ("pnnxparam", "model.pnnx.param"),
                ("pnnxbin", "model.pnnx.bin"),
                ("pnnxpy", "model_pnnx.py"),
                ("pnnxonnx", "model.pnnx.onnx"),
            )
        ),
    ]
    try:
        done = subprocess.run(words, cwd=work.folder, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"export failed: pnnx did not end within {SECONDS} s") from error
    missing = [name for name in ("model.ncnn.param", "model.ncnn.bin") if not _filled(folder / name)]
    if done.returncode != 0 or missing:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise ExportError(
            f"export failed: pnnx ended with status {done.returncode} without {' and '.join(missing) or 'an error'} "
            f"({said}); is the temporary folder full?"
        )


def _filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _facts(param: Path) -> dict[str, Any]:
    """Return the layers of an ncnn parameter file: after a magic line and a line of counts, one layer a line."""
    lines = param.read_text(encoding="utf-8").splitlines()[2:]
    kinds = [line.split()[0] for line in lines if line.strip()]
    return {"layers": len(kinds), "convolutions": sum(kind.startswith("Convolution") for kind in kinds)}
