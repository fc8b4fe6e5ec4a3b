"""An edge bundle in an environment without torch against ``kd-yolo predict`` on the same images and the same video.

Deploys and exports the checkpoint, makes a fresh virtual environment from the bundle's own requirements (or takes the
interpreter that ``python=`` names), runs ``detect.py`` in it, and compares every detection with ``kd-yolo predict`` of
the deployed checkpoint. Then it measures what the letterbox and the selection of detections cost, in processor time of
one core, on bundles of the same model at each of ``canvases``. Exit status 1 when anything differs.

    python benchmarks/bundle_check.py model=best.pt data=neu images=50
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from kd_yolo.export import export
from ultralytics.utils.metrics import box_iou

from kd_yolo.config import parse_pairs
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.deploy import deploy
from kd_yolo.files import write_json, write_text
from kd_yolo.images import dataset_files, read_image, spread
from kd_yolo.provenance import versions

DEFAULTS: dict[str, Any] = {"data": "neu", "split": "test", "images": 50, "canvases": [224, 640]}
ABSENT = ("torch", "torchvision", "ultralytics", "kd_yolo", "onnx")
COUNTS = ("pictures", "bundle_detections", "predict_detections", "same_class_pairs")
LOWEST_IOU, SCORE = 0.99, 1e-3
BARS_MS = {224: 1.0, 640: 3.0}
COST = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import cv2, detect, numpy as np
cv2.setNumThreads(1)
detector = detect.Detector(Path(sys.argv[1]), "cpu", threads=1)
images = [frame.pixels for frame in detect.read_frames(sys.argv[2], detector.channels)]
spent, found = [], 0
for index in range(4 * len(images)):
    image = images[index % len(images)]
    start = time.process_time()
    pixels = detect.to_input([image], detector.canvas, 1)
    ready = time.process_time()
    output = detector.session.run(None, {detector.entry: pixels})[0][0]
    done = time.process_time()
    rows = detect.to_image(detect.select(output, detector.head, detect.Limits()), detector.canvas, image.shape)
    spent.append((ready - start, time.process_time() - done))
    found += len(rows)
table = 1e3 * np.array(spent[len(images):])
table = np.column_stack((table, table.sum(1)))
print(json.dumps({name: dict(zip(("p50", "p90", "p99"), np.percentile(table[:, i], (50, 90, 99)).round(3).tolist()))
                  for i, name in enumerate(("pre", "post", "both"))} | {"detections": found / 4 / len(images)}))
"""


def main() -> int:
    """Compare, measure, print, write ``bundle_check.json`` and ``.md``; return the exit status."""
    values = {**DEFAULTS, **parse_pairs(sys.argv[1:])}
    model, data = Path(str(values["model"])), resolve_dataset(str(values["data"]))
    files = spread(dataset_files(data, str(values["split"])), int(values["images"]))
    with tempfile.TemporaryDirectory(prefix="kd-yolo-bundle-") as name:
        folder = Path(name)
        pictures = folder / "pictures"
        pictures.mkdir()
        for file in files:
            shutil.copy(file, pictures)
        video = make_video(files, folder / "video.avi")
        source = Path(shutil.copy(model, folder / "model.pt"))
        deployed = deploy(source, out=folder / "deployed.pt").path
        made = export(source, format="bundle", data=data)
        python = str(values.get("python") or make_environment(made.path, folder / "alone"))
        runs = {}
        for kind, place in (("images", pictures), ("video", video)):
            found, expected = detect(python, made.path, place), predict(deployed, place, made.canvas)
            runs[kind] = compare(found, expected)
        cost = {}
        for side in values["canvases"]:
            bundle = export(source, format="bundle", imgsz=side, out=folder / f"at_{side}_bundle").path
            cost[side] = json.loads(output_of([python, "-c", COST, str(bundle), str(pictures)]))
        installed = output_of([python, "-m", "pip", "list", "--format=freeze"]).splitlines()
        canvas = made.canvas
    passed = all(run["passed"] for run in runs.values())
    told = {key: values[key] for key in DEFAULTS} | {"model": model.name, "data": data.parent.name, "canvas": canvas}
    report(told, runs, cost, installed)
    return 0 if passed else 1


def make_video(files: Sequence[Path], path: Path) -> Path:
    """Write the images as the frames of a video (motion JPEG), all in the size of the first one."""
    images = [read_image(file) for file in files]
    height, width = images[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (width, height))
    for image in images:
        writer.write(cv2.resize(image, (width, height)))
    writer.release()
    return path


def make_environment(bundle: Path, folder: Path) -> Path:
    """Make a virtual environment with the bundle's requirements; return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if platform.system() == "Windows" else "bin") / "python"
    output_of([python, "-m", "pip", "install", "--quiet", "-r", bundle / "requirements.txt"])
    return python


def detect(python: str, bundle: Path, source: Path) -> list[dict[str, Any]]:
    """Run a bundle where none of ``ABSENT`` is installed."""
    code = f"import importlib.util as u; print([n for n in {ABSENT!r} if u.find_spec(n)])"
    present = output_of([python, "-c", code]).strip()
    if present != "[]":
        raise SystemExit(f"{python}: has {present}, so it proves nothing; leave python= out for a fresh environment")
    text = output_of([python, bundle / "detect.py", "--source", source, "--json", "--threads", "1"])
    return [json.loads(line) for line in text.splitlines()]


def predict(model: Path, source: Path, canvas: tuple[int, int]) -> list[dict[str, Any]]:
    """Run ``kd-yolo predict``."""
    side = str(canvas[0]) if canvas[0] == canvas[1] else f"[{canvas[0]},{canvas[1]}]"
    command = [sys.executable, "-m", "kd_yolo", "predict", f"model={model}", f"source={source}", f"imgsz={side}"]
    text = output_of([*command, "save=false", "verbose=false", "device=cpu", "json=true"])
    images: list[dict[str, Any]] = json.loads(text[text.index("{") :])["images"]
    return images


def output_of(command: Sequence[str | Path]) -> str:
    """Run a command away from the sources; return what it prints."""
    done = subprocess.run([str(word) for word in command], cwd=tempfile.gettempdir(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def compare(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pair the detections of the same picture and class, the best overlaps first; return counts and worst values."""
    names = [[Path(line["image"]).name for line in lines] for lines in (found, expected)]
    ious: list[float] = []
    scores: list[float] = []
    totals = [sum(len(line["detections"]) for line in lines) for lines in (found, expected)]
    for one, other in zip(found, expected, strict=False):
        for label in {item["class"] for item in one["detections"]}:
            ours, theirs = ([i for i in line["detections"] if i["class"] == label] for line in (one, other))
            if not theirs:
                continue
            table = box_iou(*(torch.tensor([item["box_xyxy_px"] for item in items]) for items in (ours, theirs)))
            for _ in range(min(len(ours), len(theirs))):
                row, column = divmod(int(table.argmax()), table.shape[1])
                ious.append(float(table[row, column]))
                scores.append(abs(ours[row]["confidence"] - theirs[column]["confidence"]))
                table[row], table[:, column] = -1, -1
    counts = names[0] == names[1] and totals[0] == totals[1] == len(ious) > 0
    return {
        "pictures": len(found),
        "bundle_detections": totals[0],
        "predict_detections": totals[1],
        "same_class_pairs": len(ious),
        "lowest_iou": min(ious, default=0.0),
        "largest_score_difference": max(scores, default=1.0),
        "passed": counts and min(ious) >= LOWEST_IOU and max(scores) <= SCORE,
    }


def report(values: dict[str, Any], runs: dict[str, Any], cost: dict[int, Any], installed: list[str]) -> None:
    """Print and write the tables."""
    lines = [
        "| | pictures | bundle | predict | pairs | lowest IoU | largest score difference | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, run in runs.items():
        counts = " | ".join(str(run[key]) for key in COUNTS)
        worst = f"{run['lowest_iou']:.6f} | {run['largest_score_difference']:.1e}"
        lines.append(f"| {kind} | {counts} | {worst} | {'same' if run['passed'] else 'DIFFERENT'} |")
    lines += ["", "Processor time per image on one core, ms (p50 / p90):", ""]
    lines += ["| canvas | letterbox and input | selection | both | bar | detections |", "|---|---|---|---|---|---|"]
    for side, row in cost.items():
        cells = " | ".join(f"{row[key]['p50']:.2f} / {row[key]['p90']:.2f}" for key in ("pre", "post", "both"))
        bar = f"<= {BARS_MS[side]:.1f}" if side in BARS_MS else ""
        lines.append(f"| {side} | {cells} | {bar} | {row['detections']:.1f} |")
    setting = {**values, "machine": f"{platform.machine()}, {platform.system()}", "versions": versions()}
    lines += ["", f"{setting}", "", f"bundle's environment: {', '.join(installed)}"]
    content = {"setting": setting, "environment": installed, "runs": runs, "processor_ms": cost}
    target = Path(__file__).with_suffix(".json")
    write_json(target, content)
    write_text(target.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())
