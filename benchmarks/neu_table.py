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

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neu_rows import caption, differences, markdown
from pages import pages_of, write_block
from single_runs import run_of, teacher_keys, train

from kd_yolo.checkpoints import load_model
from kd_yolo.compare.report import CompareReport
from kd_yolo.compare.run import compare
from kd_yolo.compare.settings import split_compare_keys
from kd_yolo.config import parse_pairs, refuse_unknown
from kd_yolo.data.datasets import resolve_dataset
from kd_yolo.errors import ConfigError, KDYoloError
from kd_yolo.files import write_json, write_text
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
    "our recipe": {"students": "weights", "methods": "none,score-l2,kd-lightnet"} | narrowed_defaults(),
}
SHORT = {"neu_table": ("stock", "stock long", "lightnet", "more epochs")}  # README's rows, by file; of others all
FILES = ("weights", "weights11", "teacher")


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
    parts = [markdown(reports, split, budget), caption(files["teacher"], keys, split), differences(reports, split)]
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


if __name__ == "__main__":
    main()
