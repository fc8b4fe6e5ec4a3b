"""Does the default beat stock Ultralytics on NEU-DET? Every row of the README's table, by ``kd-yolo compare``.

    python benchmarks/neu_table.py weights=yolo26n.pt weights11=yolo11n.pt data=neu

``teacher`` is a yolo26n fine-tuned on the training split at the same canvas; without ``teacher=FILE`` it is trained
first, for ``teacher_epochs``, as ``kd-yolo train`` trains its teacher. All rows of a seed have the same student epochs,
canvas, batch and data; stock rows have Ultralytics' own recipe, the others the default one. Starts:

- ``COCO``: the pretrained file; ``teacher``: the teacher itself, which has seen the labels for its own epochs. So the
  rows that start there are compared with stock trained for as long as both together, and with the teacher trained on.

Choices are made on validation; ``test=true`` judges every run on the test split, once, and writes the table. Runs are
content-addressed: call again, with more seeds or on another day, and only the rest is done. Other keys: parts=, seeds=,
epochs=, imgsz=, batch=, device=, threads=, jobs=, engine=ray, out=; ``pages=README.md,docs/recipe.md`` writes the table
into those pages, too. For another data set name= the files:

    python benchmarks/neu_table.py data=magnetic-tile imgsz=160 name=tile_table weights=...
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import pages_of, spread, write_block
from single_runs import run_of, teacher_keys, train

from kd_yolo.bench.accuracy import judge
from kd_yolo.checkpoints import load_model
from kd_yolo.compare.outcome import read_json
from kd_yolo.compare.report import CompareReport, Row
from kd_yolo.compare.run import compare
from kd_yolo.compare.settings import split_compare_keys
from kd_yolo.compare.statistics import compare_pairs
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError, KDYoloError
from kd_yolo.files import write_json, write_text
from kd_yolo.tables import markdown_table
from kd_yolo.tasks.stock_defaults import narrowed_defaults

HERE = Path(__file__).resolve().parent
SETTING: dict[str, Any] = {
    "data": "neu",
    "seeds": "0,1,2,3,4",
    "imgsz": 128,
    "epochs": 8,
    "batch": 32,
    "cache": "ram",
    "close_mosaic": 2,
    "device": "cpu",
    "threads": 1,
}
THREE = "0,1,2"  # of the parts that say more about the way than about the result; seeds= overrides
PARTS: dict[str, dict[str, Any]] = {
    "stock": {"students": "weights", "methods": "none,score-l2"},
    "lightnet": {"students": "lightnet-n,lightnet-s", "methods": "none,kd-lightnet", "pretrained": "teacher"},
    "stock long": {"students": "weights", "methods": "none", "seeds": THREE},
    "more epochs": {"students": "teacher", "methods": "none", "seeds": THREE} | narrowed_defaults(),
    "from COCO": {"students": "lightnet-n,lightnet-s", "methods": "none,kd-lightnet", "pretrained": "weights"}
    | {"seeds": THREE},
    "surgery": {"students": "weights", "methods": "none,kd-lightnet", "reparam": "qarep"},
    "yolo11n": {"students": "weights11", "methods": "none,score-l2"},
    "our recipe": {"students": "weights", "methods": "none,score-l2,kd-lightnet", "seeds": THREE} | narrowed_defaults(),
}
SHORT = {"neu_table": ("stock", "stock long", "lightnet", "more epochs")}  # README's rows, by file; of others all
FILES = ("weights", "weights11", "teacher")
BASELINE = ("stock", "none")
METRICS = ("mAP50-95", "mAP50")
LEGEND = (
    "Start: COCO, the pretrained file; teacher, the weights of the teacher. Method: none, labels only; score-l2, "
    "Ultralytics' own distillation loss; kd-lightnet, ours. CPU time: of the deployed network over yolo26n's, "
    "OpenVINO, 224 px, one thread."
)


PLACES = {"out": "runs/neu-table", "name": "neu_table", "parts": ",".join(PARTS), "teacher_epochs": 40, "pages": ""}


def main() -> None:
    """Run what is missing; with ``test=true`` judge it on the test split and write ``NAME.json`` and ``.md``."""
    try:
        measure(checked(parse_pairs(sys.argv[1:])))
    except KDYoloError as error:
        sys.exit(f"neu_table.py: {error}")


def checked(given: dict[str, Any]) -> dict[str, Any]:
    """Return all keys; ``parts`` and ``pages`` as lists, ``files`` by name, ``seeds`` alone when given.

    Raises:
        KDYoloError: An unknown key or part, a file or a page's marks that are not there.
    """
    refuse_unknown(given, [*SETTING, *FILES, *PLACES, "test", "jobs", "engine", "address"], "neu_table.py")
    keys = {**SETTING, **PLACES, "test": False, **given}
    keys["parts"] = [part.strip() for part in str(keys["parts"]).split(",")]
    for part in keys["parts"]:
        if part not in PARTS:
            raise ConfigError(f"parts={part}: unknown; known: {', '.join(PARTS)}")
    keys["files"] = {name: str(keys.pop(name)) for name in FILES if name in keys}
    needed = {"weights"} | ({"weights11"} & {PARTS[part]["students"] for part in keys["parts"]})
    for name in sorted(needed | set(keys["files"])):
        if not Path(keys["files"].get(name, "")).is_file():
            raise ConfigError(f"{name}={keys['files'].get(name, '')}: no such file; give a pretrained checkpoint")
    keys["pages"] = pages_of(keys["pages"], str(keys["name"]))
    if keys["pages"] and not keys["test"]:
        raise ConfigError("pages=: pages hold figures of the test split; add test=true")
    keys["seeds_given"] = "seeds" in given
    return keys


def measure(keys: dict[str, Any]) -> None:
    """Train and judge; write the files."""
    own = {name: keys.pop(name) for name in (*PLACES, "files", "test", "seeds_given")}
    files, out, split = own["files"], Path(str(own["out"])).resolve(), "test" if own["test"] else "val"
    if "teacher" not in files:
        files["teacher"] = str(teacher_of(files["weights"], int(own["teacher_epochs"]), keys, out))
    budget = (int(keys["epochs"]), int(load_model(files["teacher"])[1].get("train_args", {}).get("epochs", 0)))
    reports = {part: run(part, files, with_length(part, keys, budget), out, own) for part in own["parts"]}
    parts = [markdown(reports, split, budget), caption(files["teacher"], keys, split), gains(reports, split)]
    text = "\n\n".join(part for part in parts if part)
    print(text)
    if own["test"]:
        content = {part: {k: v for k, v in report.to_dict().items() if k in KEPT} for part, report in reports.items()}
        write_json(HERE / f"{own['name']}.json", content)
        write_text(HERE / f"{own['name']}.md", text + "\n")
    short = {part: report for part, report in reports.items() if part in SHORT.get(str(own["name"]), reports)}
    for page in own["pages"]:  # the README shows the rows that answer its question
        shown = "\n\n".join([markdown(short, split, budget), *parts[1:2]]) if page == "README.md" else text
        write_block(page, str(own["name"]), shown)


def teacher_of(weights: str, epochs: int, values: dict[str, Any], out: Path) -> Path:
    """Fine-tune the pretrained file on the data set, unless that is done, and return the checkpoint."""
    stock = {key: values[key] for key in ("imgsz", "batch", "device")}
    data = str(resolve_dataset(str(values["data"])))
    given = teacher_keys(str(Path(weights).absolute()), data, epochs)
    job = run_of("teacher", {**stock, **given, "data": data, "seed": 0}, out, int(values["threads"]))
    train([job], 1)
    return job.checkpoint


KEPT = ("setting", "rows", "notes")


def run(part: str, files: dict[str, str], values: dict[str, Any], out: Path, own: dict[str, Any]) -> CompareReport:
    """Run one comparison; all share the folder of runs."""
    wanted = {key: files.get(str(value), value) for key, value in PARTS[part].items()}
    if own["seeds_given"]:
        wanted.pop("seeds", None)
    given = {**values, **wanted, "teacher": files["teacher"] if "," in wanted["methods"] else "none"}
    place = {"project": str(out.parent), "name": out.name, "out": str(out / "reports" / part.replace(" ", "-"))}
    judged = {"test": True, "test_methods": wanted["methods"]} if own["test"] else {}
    keys, stock = split_compare_keys({**given, **place, **judged})
    report = compare(keys, stock)
    if line := report.failure_line():
        sys.exit(line)
    return report


def with_length(part: str, values: Mapping[str, Any], budget: tuple[int, int]) -> dict[str, Any]:
    """Return a part's setting; ``stock long`` is trained for as long as student and teacher together."""
    return {**values, "epochs": sum(budget), "close_mosaic": sum(budget) // 4} if part == "stock long" else {**values}


def markdown(reports: dict[str, CompareReport], split: str, budget: tuple[int, int]) -> str:
    """Return the table: every row against stock, by seed.

    Args:
        reports: By part.
        split: Whose figures are shown.
        budget: Epochs of a student and of the teacher.
    """
    rows = [(part, row) for part, report in reports.items() for row in report.rows]
    base = next((row for part, row in rows if (part, row.method) == BASELINE), None)
    header = ["student", "start", "method", "epochs on labels", "CPU time", "seeds", *METRICS]
    known = [[*described(part, row), epochs(part, row, budget), cpu_time(part, row)] for part, row in rows]
    found = [[*figures(row, split), *(against(row, base, split) if base else [])] for _, row in rows]
    lines = [[*one, *other] for one, other in zip(known, found, strict=True)]
    return markdown_table([*header, *([f"against stock, {budget[0]} epochs", "95 % interval"] if base else [])], lines)


def epochs(part: str, row: Row, budget: tuple[int, int]) -> str:
    """Return for how many epochs a row's weights were trained on the labels, and its teacher's."""
    student, teacher = budget
    if part == "stock long":
        return str(student + teacher)
    if start_of(part) == "teacher":
        return f"{teacher} + {student}"
    return str(student) if row.method == "none" else f"{student}, teacher {teacher}"


def cpu_time(part: str, row: Row) -> str:
    """Return a deployed student's inference time over yolo26n's: OpenVINO, 224 px, one thread; merged surgery is 1."""
    name = row.student if row.student.startswith("lightnet") else part if part == "yolo11n" else "yolo26n"
    report = next(r for r in read_json(HERE / "model_latency.json")["reports"] if is_cpu_time(r))
    rounds = {Path(one["artifact"]).name.rsplit("-", 1)[0]: one["rounds_ms"]["inference"] for one in report["rows"]}
    return f"{statistics.median(a / b for a, b in zip(rounds[name], rounds['yolo26n'], strict=True)):.2f}"


def is_cpu_time(report: dict[str, Any]) -> bool:
    """Tell whether a latency report is the one that the table quotes."""
    return bool(report["format"] == "openvino" and report["canvas"][0] == 224)


def start_of(part: str) -> str:
    """Return where a part's students start."""
    return "teacher" if part in {"lightnet", "more epochs"} else "COCO"


def caption(teacher: str, values: dict[str, Any], split: str) -> str:
    """Return what the columns mean and what the teacher itself reaches."""
    data = str(resolve_dataset(str(values["data"])))
    found = judge(Path(teacher), data, split, int(values["imgsz"]))
    return (
        f"{Path(data).parent.name}, {split} split, canvas {values['imgsz']}, batch {values['batch']}; mean ± sd over "
        f"seeds; differences paired by seed, t intervals. {LEGEND} The teacher itself: {100 * found.map50_95:.1f} "
        f"mAP50-95, {100 * found.map50:.1f} mAP50."
    )


def gains(reports: dict[str, CompareReport], split: str) -> str:
    """Return what distillation adds to plain training from the same weights, by seed; nothing without such rows."""
    lines = []
    for part, report in reports.items():
        plain = {row.student: row for row in report.rows if row.method == "none"}
        lines += [
            [*described(part, row), *against(row, plain[row.student], split)]
            for row in report.rows
            if row.method != "none" and row.student in plain
        ]
    header = ["student", "start", "method", "against none from the same start", "95 % interval"]
    return markdown_table(header, lines) if lines else ""


def described(part: str, row: Row) -> list[str]:
    """Return what a row is, in words."""
    named = {"stock": "yolo26n", "surgery": "yolo26n, qarep", "yolo11n": "yolo11n", "stock long": "yolo26n"}
    named["more epochs"] = named["our recipe"] = "yolo26n, our recipe"
    return [named.get(part, row.student), start_of(part), row.method]


def results(row: Row, metric: str, split: str) -> list[float]:
    """Return a row's points on a split, by seed."""
    return (row.test if split == "test" else row.values).get(metric, [])


def figures(row: Row, split: str) -> list[str]:
    """Return the number of runs, and mean and deviation of each metric."""
    return [str(len(results(row, METRICS[0], split))), *(spread(results(row, metric, split)) for metric in METRICS)]


def against(row: Row, base: Row | None, split: str) -> list[str]:
    """Return the mean difference from the baseline, paired by seed, and its t interval."""
    if base is None or row is base:
        return ["", ""]
    by_seed = dict(zip([place[0] for place in base.places], results(base, METRICS[0], split), strict=False))
    pairs = [
        (value, by_seed[place[0]])
        for place, value in zip(row.places, results(row, METRICS[0], split), strict=False)
        if place[0] in by_seed
    ]
    if len(pairs) < 2:
        return [f"{pairs[0][0] - pairs[0][1]:+.1f}" if pairs else "", ""]
    found = compare_pairs([a for a, _ in pairs], [b for _, b in pairs], 0.95, 0.5)
    return [f"{found.mean:+.1f}", f"{found.t_low:+.1f} to {found.t_high:+.1f}"]


if __name__ == "__main__":
    main()
