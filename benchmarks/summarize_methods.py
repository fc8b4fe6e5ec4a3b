"""From the committed measurements to what ``kd-yolo methods`` and docs/methods/index.md show.

    python benchmarks/summarize_methods.py

Reads ``neu_methods.json`` and ``method_cost.json``, writes ``cfg/measured/methods.yaml`` and the tables between the
marks ``<!-- measured -->`` of docs/methods/index.md. A test repeats it and compares.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import yaml

from kd_yolo.files import write_text
from kd_yolo.measured import Measured, MeasuredMethods

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CANVAS = 224
# Label in the comparison: part, method, what was set beside its defaults, label in the cost table.
FORMS = {
    "score-l2": ("default", "score-l2", "", "score-l2"),
    "kd-lightnet": ("default", "kd-lightnet", "kd.one2one=false", "kd-lightnet"),  # the default of that time
    "kd-lightnet-mild": ("default", "kd-lightnet", "gamma 1, cosine decay, off in the mosaic tail, no balancing", None),
    "cwd+bckd": ("methods", "cwd+bckd", "", "cwd+bckd"),
    "tskd": ("methods", "tskd", "", "tskd:intended"),
    "tskd-published": ("methods", "tskd", "kd.variant=published", "tskd:published"),
    "tskd-crd": ("tskd", "tskd", "published, CRD alone", None),
    "tskd-ded": ("tskd", "tskd", "published, DED alone", None),
    "tskd-drd": ("tskd", "tskd", "kd.se=false", None),
    "hflkd": ("methods", "hflkd", "", "hflkd"),
}
OPENED, CLOSED = "<!-- measured -->", "<!-- /measured -->"


def main() -> None:
    """Write both files."""
    measured = collect()
    text = yaml.safe_dump(measured.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True, width=110)
    write_text(ROOT / "cfg" / "measured" / "methods.yaml", "# Written by benchmarks/summarize_methods.py.\n" + text)
    page = ROOT / "docs" / "methods" / "index.md"
    written = page.read_text(encoding="utf-8")
    block = f"{OPENED}\n\n{tables(measured)}\n\n{CLOSED}"
    write_text(page, re.sub(f"{OPENED}.*{CLOSED}", lambda _: block, written, flags=re.DOTALL))


def collect() -> MeasuredMethods:
    """Return everything that was measured."""
    content = json.loads((HERE / "neu_methods.json").read_text(encoding="utf-8"))
    costs = json.loads((HERE / "method_cost.json").read_text(encoding="utf-8"))["rows"]
    rows = [row_of(label, form, content["parts"], costs) for label, form in FORMS.items()]
    named = {form[3] for form in FORMS.values()}
    for key in sorted(costs):
        label, _, canvas = key.partition("@")
        if label not in {*named, "stock"} and canvas == str(CANVAS):
            rows.append(Measured.model_validate({"method": label, **cost_of(costs[key], label)}))
    return MeasuredMethods(gain_setting=gain_setting(content), cost_setting=cost_setting(costs), methods=rows)


def row_of(label: str, form: tuple[str, str, str, str | None], parts: Any, costs: Any) -> Measured:
    """Return one row: the gain from the comparison, the cost where it was measured."""
    part, method, text, cost_label = form
    found = next(row for row in parts[part]["rows"] if row["method"] == label)["gain"]
    gain = {
        "gain": round(found["mean"], 2),
        "low": round(found["t_low"], 2),
        "high": round(found["t_high"], 2),
        "pairs": found["pairs"],
        "verdict": found["verdict"],
    }
    cost = costs.get(f"{cost_label}@{CANVAS}")
    costed = cost_of(cost, str(cost_label)) if cost else {}
    return Measured.model_validate({"method": method, "form": text, **gain, **costed})


def cost_of(row: Any, label: str) -> dict[str, float]:
    """Return medians of the per-round ratios, and the ratio of the peaks."""

    def ratio(base: str) -> float:
        pairs = zip(row["step_ms"][label], row["step_ms"][base], strict=True)
        return round(float(statistics.median(a / b for a, b in pairs)), 2)

    memory = row["peak_memory_mb"]
    return {
        "step_of_none": ratio("none"),
        "step_of_stock": ratio("stock"),
        "memory_of_none": round(memory[label] / memory["none"], 2),
    }


def gain_setting(content: Any) -> str:
    """Return one line on how gains were measured."""
    shown = content["parts"]["default"]["setting"]["shown"]
    return (
        f"NEU-DET validation, LightNet-n from a COCO yolo26n under a yolo26n fine-tuned for 16 epochs, canvas "
        f"{shown['imgsz']}, {shown['epochs']} epochs, batch {shown['batch']}; gain over labels only, paired by seed, "
        "95 % t interval, verdict after Holm's correction (benchmarks/neu_methods.md)"
    )


def cost_setting(costs: Any) -> str:
    """Return one line on how costs were measured."""
    mark = costs[f"stock@{CANVAS}"]["fingerprint"]
    return (
        f"yolo26n under yolo26s (ld: yolo11n, yolo11s), {CANVAS} px, batch {mark['batch']}, {mark['threads']} CPU "
        "thread, median of interleaved rounds (benchmarks/method_cost.md)"
    )


def tables(measured: MeasuredMethods) -> str:
    """Return the Markdown tables."""
    lines = ["| method | gain, points mAP50-95 | 95 % interval | pairs | verdict |", "|---|---|---|---|---|"]
    for row in measured.methods:
        if row.gain is not None:
            name = f"{row.method}, {row.form}" if row.form else f"**{row.method}**"
            interval = f"{row.low:+.2f} to {row.high:+.2f}"
            lines.append(f"| {name} | {row.gain:+.2f} | {interval} | {row.pairs} | {row.verdict} |")
    lines += ["", f"{measured.gain_setting}.", ""]
    lines.append("| method | step / plain training | step / `distill_model` | memory / plain training |")
    lines.append("|---|---|---|---|")
    timed = [row for row in measured.methods if row.step_of_stock is not None]
    for row in sorted(timed, key=lambda one: one.step_of_stock or 0):
        name = f"{row.method}, {row.form}" if row.form else row.method
        lines.append(f"| {name} | {row.step_of_none:.2f} | {row.step_of_stock:.2f} | {row.memory_of_none:.2f} |")
    return "\n".join([*lines, "", f"{measured.cost_setting}."])


if __name__ == "__main__":
    main()
