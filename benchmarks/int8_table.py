"""What int8 costs and buys: accuracy and latency of every way to quantize, for several checkpoints.

Run it with ``python benchmarks/int8_table.py models=a.pt,b.pt data=DATA.yaml imgsz=224 out=benchmarks/int8_table``.
The layers that stay in float are chosen on the validation split; the figures are those of the test split. Latency is
processor time of one image on one thread, so that other load on the machine does not enter; rounds are interleaved.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from kd_yolo.export import export
from kd_yolo.export.calibration import CALIBRATION_IMAGES, Calibration, calibration_files, calibration_pixels
from kd_yolo.export.int8 import search_float_layers
from kd_yolo.export.int8_onnx import OnnxQuantizer
from kd_yolo.export.int8_openvino import OpenVinoQuantizer

from kd_yolo.bench.accuracy import judge
from kd_yolo.config import parse_pairs
from kd_yolo.files import write_json, write_text
from kd_yolo.images import read_image, spread, to_canvas
from kd_yolo.provenance import versions
from kd_yolo.runtimes import open_session
from kd_yolo.tables import markdown_table

MAX_DROP = 0.5
ROUNDS, CALLS = 8, 20
NOTE = (
    "One training run of one seed is behind each model, and the validation split is small: differences of a few tenths "
    "of a point between rows are noise. mAP in points. 'stock' is what Ultralytics' quantize=8 does (ONNX: ONNX "
    "Runtime's static quantization of all convolutions; OpenVINO: NNCF's default on the whole graph)."
)


@dataclass
class Row:
    """One way to quantize one model for one runtime.

    Attributes:
        model: Name of the checkpoint.
        runtime: ``onnx`` or ``openvino``.
        way: ``float``, ``stock``, ``all layers``, ``head in float`` or ``mixed``.
        int8_layers: Convolutions in int8, or None where a foreign quantizer chose.
        val: mAP50-95 on the validation split, points.
        test: mAP50-95 on the test split, points.
        test_drop: Points lost against float on the test split.
        latency_ms: Median processor time of one image.
        ratio: That over the float artifact's of the same runtime.
        worst: The most sensitive layers, the worst first.
    """

    model: str
    runtime: str
    way: str
    int8_layers: int | None
    val: float
    test: float
    test_drop: float = 0.0
    latency_ms: float = 0.0
    ratio: float = 1.0
    worst: str = ""


class Study:
    """One checkpoint in one folder."""

    def __init__(self, name: str, data: str, side: int, calibration: Calibration, folder: Path) -> None:
        self.name, self.data, self.side, self.calibration, self.folder = name, data, side, calibration, folder
        self.rows: list[Row] = []
        self.paths: list[Path] = []

    def judge(self, path: Path, split: str = "val") -> float:
        """Return the mAP50-95 of an artifact, 0 to 1."""
        return judge(path, self.data, split, self.side).map50_95

    def add(self, path: Path, runtime: str, way: str, layers: int | None, worst: str = "") -> None:
        """Judge an artifact on both splits."""
        val, test = (self.judge(path, split) * 100 for split in ("val", "test"))
        self.rows.append(Row(self.name, runtime, way, layers, val, test, worst=worst))
        self.paths.append(path)
        print(f"{self.name} {runtime} {way}: val {val:.2f} test {test:.2f}", flush=True)

    def run_onnx(self, source: Path) -> None:
        """Quantize an ONNX file in every way."""
        self.add(source, "onnx", "float", None)
        stock = self.folder / "stock.onnx"
        stock_onnx(source, stock, self.calibration, self.side)
        self.add(stock, "onnx", "stock", None)
        maker = OnnxQuantizer.of(source, list(self.calibration), (self.side, self.side), 3)
        everything = self.folder / "all.onnx"
        maker.write(everything, list(maker.network.layers))
        self.add(everything, "onnx", "all layers", len(maker.network.layers))

        def build(floats: tuple[str, ...]) -> Path:
            path = self.folder / f"mixed{len(floats)}.onnx"
            maker.write(path, set(maker.candidates) - set(floats))
            return path

        self.search("onnx", [item.layer for item in maker.rank()], build)

    def run_openvino(self, source: Path) -> None:
        """Quantize an OpenVINO folder in every way."""
        self.add(source, "openvino", "float", None)
        maker = OpenVinoQuantizer(source, list(self.calibration), (self.side, self.side), 3)
        stock = self.folder / "stock_openvino_model"
        stock_openvino(maker, stock)
        self.add(stock, "openvino", "stock", None)

        def build(floats: tuple[str, ...]) -> Path:
            path = self.folder / f"mixed{len(floats)}_openvino_model"
            maker.write(path, floats)
            return path

        self.search("openvino", [item.layer for item in maker.rank()], build)

    def search(self, runtime: str, ranking: Sequence[str], build: Callable[[tuple[str, ...]], Path]) -> None:
        """Add the artifact with the head alone in float, and the one that holds the bound."""
        self.add(build(()), runtime, "head in float", len(ranking), ", ".join(ranking[:3]))
        known = {self.paths[-1]: self.rows[-1].val / 100}
        wanted = next(row.val for row in self.rows if row.runtime == runtime) / 100

        def judge_once(path: Path) -> float:
            if path not in known:
                known[path] = self.judge(path)
            return known[path]

        found = search_float_layers(ranking, build, judge_once, wanted, MAX_DROP)
        self.add(found.path, runtime, "mixed", len(ranking) - len(found.layers), ", ".join(ranking[:3]))


def stock_onnx(source: Path, out: Path, calibration: Calibration, side: int) -> None:
    """Quantize an ONNX file with Ultralytics' own function, and keep its metadata."""
    from ultralytics.utils.export.onnx import onnx_int8_quantize

    batches = list(calibration_pixels(calibration, (side, side)))
    onnx_int8_quantize(source, out, batches, lambda batch: batch)
    made, before = onnx.load(out), onnx.load(source)
    del made.metadata_props[:]
    made.metadata_props.extend(before.metadata_props)
    onnx.save(made, out)


def stock_openvino(maker: OpenVinoQuantizer, out: Path) -> None:
    """Quantize an OpenVINO model as Ultralytics does: NNCF on the whole graph."""
    import nncf
    import openvino

    images = nncf.Dataset(list(calibration_pixels(maker.files, maker.canvas)))
    made = nncf.quantize(
        maker.model.clone(), images, preset=nncf.QuantizationPreset.MIXED, subset_size=len(maker.files)
    )
    out.mkdir()
    openvino.save_model(made, out / maker.xml.name, compress_to_fp16=False)
    shutil.copy(maker.xml.parent / "metadata.yaml", out)


def measure(rows: Sequence[Row], paths: Sequence[Path], image: Path) -> None:
    """Set the latency of every row: the median over interleaved rounds."""
    sessions = [open_session(path, threads=1) for path in paths]
    pixels = to_canvas([read_image(image)], sessions[0].canvas)
    times: list[list[float]] = [[] for _ in sessions]
    for round_ in range(ROUNDS + 1):
        for index, session in enumerate(sessions):
            for _ in range(CALLS):
                start = time.process_time()
                session.infer(pixels)
                if round_:  # the first round warms up
                    times[index].append(time.process_time() - start)
    for row, values in zip(rows, times, strict=True):
        row.latency_ms = float(np.median(values)) * 1e3
        reference = next(r for r in rows if r.model == row.model and r.runtime == row.runtime)
        row.ratio = row.latency_ms / reference.latency_ms
        row.test_drop = reference.test - row.test


def main() -> None:
    """Quantize, judge and time; write ``<out>.json`` and ``<out>.md``."""
    values: dict[str, Any] = {
        "imgsz": 224,
        "runtimes": "onnx,openvino",
        "images": CALIBRATION_IMAGES,
        "out": str(Path(__file__).with_suffix("")),
        **parse_pairs(sys.argv[1:]),
    }
    runtimes = str(values["runtimes"]).split(",")
    models, side = str(values["models"]).split(","), int(values["imgsz"])
    calibration = calibration_files(str(values["data"]), int(values["images"]))
    rows: list[Row] = []
    for model in models:
        path = Path(model)
        name = path.parents[1].name if path.parent.name == "weights" else path.stem
        with tempfile.TemporaryDirectory() as folder:
            study = Study(name, str(values["data"]), side, calibration, Path(folder))
            if "onnx" in runtimes:
                study.run_onnx(export(path, format="onnx", imgsz=side, out=Path(folder) / "float.onnx").path)
            if "openvino" in runtimes:
                out = Path(folder) / "float_openvino_model"
                study.run_openvino(export(path, format="openvino", imgsz=side, out=out).path)
            measure(study.rows, study.paths, spread(list(calibration), 1)[0])
            rows += study.rows
        save(Path(str(values["out"])), rows, calibration, side)


def save(out: Path, rows: Sequence[Row], calibration: Calibration, side: int) -> None:
    """Write the rows so far."""
    about = calibration.to_dict() | {"source": Path(calibration.source).parent.name}
    content = {"imgsz": side, "note": NOTE, "max_drop": MAX_DROP, "calibration": about, "versions": versions()}
    write_json(out.with_suffix(".json"), content | {"rows": [asdict(row) for row in rows]})
    header = ("model", "runtime", "int8", "layers", "val", "test", "points lost", "ms", "of float", "most sensitive")
    lines = [
        (
            row.model,
            row.runtime,
            row.way,
            "" if row.int8_layers is None else str(row.int8_layers),
            f"{row.val:.2f}",
            f"{row.test:.2f}",
            f"{row.test_drop:+.2f}",
            f"{row.latency_ms:.2f}",
            f"{row.ratio:.2f}",
            row.worst,
        )
        for row in rows
    ]
    title = f"Canvas {side}x{side}, {calibration.to_dict()['images']} calibration images."
    write_text(out.with_suffix(".md"), f"{title} {NOTE}\n\n{markdown_table(header, lines)}\n")


if __name__ == "__main__":
    main()
