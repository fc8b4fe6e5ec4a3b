"""Every export format of one checkpoint in one table: accuracy, latency p50 / p90 / p99, frames per second, size.

    python benchmarks/fps.py model=best.pt data=neu.yaml imgsz=224 threads=1 readme=true

Exports each of ``formats`` (``NAME`` or ``NAME:BITS``) with the parity gate, then times and judges all of them in one
interleaved benchmark on the test split, and writes ``fps.json`` and ``fps.md`` beside this script; with ``readme=true``
also the block between ``<!-- fps -->`` and ``<!-- /fps -->`` in README.md. ``folder=`` keeps the exported files.
A format that cannot be made here is named under the table with the reason.

Other keys: split=test rounds=20 iterations=20 stream=300 device=cpu target=GPU (for engines) targets=rtx3070ti,t4
max_drop=0.5 trust=false.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_yolo.export import export
from pages import write_block

from kd_yolo.bench import BenchReport, benchmark
from kd_yolo.bench.report import BenchRow
from kd_yolo.bench.tables import estimates_notes, estimates_table
from kd_yolo.bench.writing import public
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError, KDYoloError
from kd_yolo.files import write_json, write_text
from kd_yolo.tables import markdown_table

FORMATS = "pt,onnx,onnx:16,onnx:8,openvino,openvino:16,openvino:8,torchscript,ncnn,ncnn:16"
DEFAULTS: dict[str, Any] = {
    "formats": FORMATS,
    "imgsz": 224,
    "threads": 1,
    "split": "test",
    "rounds": 20,
    "iterations": 20,
    "stream": 300,
    "device": "cpu",
    "max_drop": 0.5,
    "targets": "",
    "target": None,
    "folder": None,
    "readme": False,
    "trust": False,
}


def main() -> None:
    """Export, time, judge, write."""
    given = parse_pairs(sys.argv[1:])
    refuse_unknown(given, ["model", "data", *DEFAULTS], "fps.py")
    values = {**DEFAULTS, **given}
    for key in ("model", "data"):
        if not values.get(key):
            raise ConfigError(f"fps.py: give {key}=")
    with tempfile.TemporaryDirectory(prefix="kd-yolo-fps-") as temporary:
        folder = Path(str(values["folder"] or temporary))
        folder.mkdir(parents=True, exist_ok=True)
        artifacts, skipped = export_all(values, folder)
        shared = {key: values[key] for key in ("split", "rounds", "iterations", "stream", "threads")}
        report = benchmark(
            artifacts,
            imgsz=values["imgsz"],
            data=str(values["data"]),
            device=str(values["device"]),
            targets=words(values["targets"]),
            trust=values["trust"],
            **shared,
        )
    write(public(report), skipped, bool(values["readme"]))


def export_all(values: Mapping[str, Any], folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the exported files, and by format why the others could not be made."""
    checkpoint = folder / Path(str(values["model"])).name
    if not checkpoint.exists() or not checkpoint.samefile(str(values["model"])):
        shutil.copyfile(str(values["model"]), checkpoint)
    data = str(resolve_dataset(str(values["data"])))
    made: list[Path] = []
    skipped: dict[str, str] = {}
    for name in words(values["formats"]):
        form, _, bits = name.partition(":")
        if form == "pt":
            made.append(checkpoint)
            continue
        keys: dict[str, Any] = {"imgsz": values["imgsz"], "data": data, "trust": values["trust"]}
        keys |= {"quantize": int(bits)} if bits else {}
        keys |= {"max_drop": float(values["max_drop"])} if bits == "8" else {}
        keys |= {"target": values["target"]} if form == "engine" and values["target"] else {}
        try:
            made.append(Path(export(checkpoint, format=form, **keys).path))
        except KDYoloError as error:  # one format that this machine cannot make must not cost the others
            skipped[name] = str(error).replace(f"{folder}/", "")
            print(f"{name}: {skipped[name]}", file=sys.stderr)
    return made, skipped


def write(report: BenchReport, skipped: Mapping[str, str], readme: bool) -> None:
    """Write ``fps.json`` and ``fps.md`` beside this script, and the README's block."""
    text = to_markdown(report, skipped)
    target = Path(__file__).with_suffix(".json")
    command = [word if "/" not in word else f"{word.split('=')[0]}={Path(word).name}" for word in sys.argv[1:]]
    content = {
        "command": " ".join(["python benchmarks/fps.py", *command]),
        "skipped": dict(skipped),
        **report.to_dict(),
    }
    write_json(target, content)
    write_text(target.with_suffix(".md"), text + "\n")
    if readme:
        write_block("README.md", "fps", text)
    print(text)


def to_markdown(report: BenchReport, skipped: Mapping[str, str]) -> str:
    """Return the table and what it holds for."""
    first = report.rows[0].latency_ms["inference"].p50
    header = ["file", "runs in", "mAP50", "mAP50-95", "inference ms p50 / p90 / p99", "x", "whole ms", "FPS", "MB"]
    lines = [markdown_table(header, [cells(row, first) for row in report.rows]), "", *report.conditions()]
    lines.append(f"x: median inference time of {report.rows[0].artifact} by that of the row.")
    if report.estimates:
        lines += ["", estimates_table(report.estimates), "", *estimates_notes(report.estimates)]
    lines += [f"Not made here: {name} ({reason})." for name, reason in skipped.items()]
    return "\n".join(lines)


def cells(row: BenchRow, first: float) -> list[str]:
    """Return one line of the table."""
    inference, whole = row.latency_ms["inference"], row.latency_ms["whole"]
    return [
        f"`{row.artifact}` ({row.precision})",
        row.runtime,
        "-" if row.map50 is None else f"{100 * row.map50:.1f}",
        "-" if row.map50_95 is None else f"{100 * row.map50_95:.1f}",
        f"{inference.p50:.2f} / {inference.p90:.2f} / {inference.p99:.2f}",
        f"{first / inference.p50:.2f}",
        f"{whole.p50:.2f} / {whole.p90:.2f} / {whole.p99:.2f}",
        f"{row.fps:.0f}",
        f"{row.size_mb:.1f}",
    ]


def words(value: Any) -> Sequence[str]:
    """Return the parts of ``a,b,c``."""
    parts = value if isinstance(value, list) else str(value or "").split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


if __name__ == "__main__":
    try:
        main()
    except KDYoloError as error:
        sys.exit(str(error))
