"""Which distillation method helps a small student on NEU-DET? Three comparisons by ``kd-yolo compare``, one setting.

    python benchmarks/neu_methods.py teacher=yolo26n-neu.pt pretrained=yolo26n.pt data=neu out=runs/neu-methods

``teacher`` is a yolo26n fine-tuned on NEU-DET for 16 epochs at canvas 128 (``kd-yolo train data=neu model=yolo26n.pt
teacher=none imgsz=128 epochs=16 batch=32 close_mosaic=4``); the student, LightNet-n in the layout of
``layouts/lightnet-n-shallow.yaml``, starts from ``pretrained``.

- ``default``: plain training, Ultralytics' own loss (score-l2) and this project's default, five seeds. The winner is
  judged on the test split, once.
- ``methods``: every method of the table, three seeds.
- ``tskd``: the parts of TSKD, three seeds.

The committed figures of ``kd-lightnet`` are those of its default at that time, ``kd.one2one=false``.

All choices are made on the validation split. Runs are content-addressed: what is done is not done again, and a run that
two comparisons need is trained once. ``parts=tskd`` does a part of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kd_yolo.compare.report import CompareReport
from kd_yolo.compare.run import compare
from kd_yolo.compare.settings import split_compare_keys
from kd_yolo.config import parse_pairs
from kd_yolo.files import write_json, write_text

HERE = Path(__file__).resolve().parent
OWN = HERE / "methods"
STUDENT = HERE / "layouts" / "lightnet-n-shallow.yaml"
SETTING = {"imgsz": 128, "epochs": 8, "batch": 32, "cache": "ram", "close_mosaic": 2, "device": "cpu", "threads": 1}
PARTS: dict[str, dict[str, Any]] = {
    "default": {
        "methods": ["none", "score-l2", str(OWN / "kd-lightnet-mild.yaml"), "kd-lightnet"],
        "seeds": "0,1,2,3,4",
        "test": True,
        "test_methods": ["winner", "none"],
    },
    "methods": {
        "methods": ["none", "score-l2", "kd-lightnet", "cwd+bckd", str(OWN / "tskd-published.yaml"), "tskd", "hflkd"],
        "seeds": "0,1,2",
    },
    "tskd": {
        "methods": ["none", *(str(OWN / f"tskd-{name}.yaml") for name in ("crd", "ded", "published", "drd")), "tskd"],
        "seeds": "0,1,2",
    },
}
TITLES = {
    "default": "Plain training, Ultralytics' own loss, and the default",
    "methods": "Every method",
    "tskd": "The parts of TSKD: CRD; DED; both, as published; with DRD; with DRD and SE, as intended",
}


def main() -> None:
    """Run what is missing and write ``neu_methods.json``, ``.md`` and one picture a part."""
    values: dict[str, Any] = {"data": "neu", "out": "runs/neu-methods", **parse_pairs(sys.argv[1:])}
    chosen = str(values.pop("parts", ",".join(PARTS))).split(",")
    out = Path(str(values.pop("out"))).resolve()
    reports = {part: run(part, values, out) for part in chosen}
    content = {
        "command": "python benchmarks/neu_methods.py teacher=yolo26n-neu.pt pretrained=yolo26n.pt data=neu",
        "parts": {part: public(report) for part, report in reports.items()},
    }
    if set(chosen) != set(PARTS):
        print("not all parts were asked for: nothing is written")
        return
    write_json(HERE / "neu_methods.json", content)
    blocks = [f"## {TITLES[part]}\n\n{report.to_markdown()}" for part, report in reports.items()]
    write_text(HERE / "neu_methods.md", "\n\n".join(["# Methods on NEU-DET, validation split", *blocks]) + "\n")


def run(part: str, values: dict[str, Any], out: Path) -> CompareReport:
    """Run one comparison; all share the folder of runs."""
    keys, stock = split_compare_keys(
        {**SETTING, "students": str(STUDENT), **PARTS[part], **values, "project": str(out.parent), "name": out.name}
        | {"out": str(HERE / "neu_methods" / part)}
    )
    report = compare(keys, stock)
    if line := report.failure_line():
        sys.exit(line)
    return report


def public(report: CompareReport) -> dict[str, Any]:
    """Return a report without the records of the single runs, which name folders."""
    return {key: value for key, value in report.to_dict().items() if key in {"setting", "rows", "notes"}}


if __name__ == "__main__":
    main()
