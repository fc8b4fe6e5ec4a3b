"""What the scripts in ``benchmarks/`` compute; they themselves run for minutes."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_bench_report import report, row
from ultralytics.nn.tasks import DetectionModel

from kd_yolo.bench.writing import public
from kd_yolo.compare.report import CompareReport, Row
from kd_yolo.config import split_train_keys
from kd_yolo.errors import ConfigError, KDYoloError

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script as Python runs it: its own folder first on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_fps__table(monkeypatch: pytest.MonkeyPatch) -> None:
    fps = load("fps", monkeypatch)
    rows = (
        row("best.pt", 2, map50=0.771, map50_95=0.4),
        row("best_int8.onnx", 1, precision="int8", runtime="onnxruntime"),
    )
    lines = fps.to_markdown(report(*rows), {"engine": "no GPU"}).splitlines()
    # inference of a row: 10 and 12 ms times its scale, so p50 is 22 and 11
    assert lines[2].startswith("| `best.pt` (fp32) | torch eager | 77.1 | 40.0 | 22.00 / ")
    assert "| 1.00 |" in lines[2]
    assert "| `best_int8.onnx` (int8) | onnxruntime | - | - | 11.00 / " in lines[3]
    assert "| 2.00 |" in lines[3]
    assert lines[-1] == "Not made here: engine (no GPU)."


def test_pages__a_block_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = load("pages", monkeypatch)
    page = "before\n<!-- fps -->\nold\n<!-- /fps -->\nafter\n"
    once = pages.replace_block(page, "fps", "new")
    assert once == "before\n<!-- fps -->\nnew\n<!-- /fps -->\nafter\n"
    assert pages.replace_block(once, "fps", "new") == once
    for wrong in ("no marks", "<!-- fps -->", "<!-- /fps --> <!-- fps -->", page + page):
        with pytest.raises(ConfigError, match=r"README\.md: needs <!-- fps --> and"):
            pages.replace_block(wrong, "fps", "new")


def test_model_latency__ratios_are_paired_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("model_latency", monkeypatch)
    # the machine slowed down in round two: times double for both, the ratio stays
    medians = {"yolo26n-224.onnx": [10.0, 20.0, 10.0], "lightnet-n-224.onnx": [5.0, 10.0, 6.0]}
    rows = [replace(row(name, 1), rounds_ms={"inference": values, "whole": values}) for name, values in medians.items()]
    text = script.ratios([("onnx", report(*rows))])
    assert "| yolo26n | 1.00 (1.00-1.00) |  |" in text
    assert "| lightnet-n | 0.50 (0.50-0.60) | <= 0.67 |" in text
    assert "| model | onnx 224 | wanted |" in text


def test_gpu_latency__says_in_one_line_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    script = load("gpu_latency", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_latency.py"])
    with pytest.raises(KDYoloError, match="needs a CUDA GPU") as caught:
        script.main()
    assert "\n" not in str(caught.value)


def test_gpu_latency__short_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("gpu_latency", monkeypatch)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "gpu_latency.py"))
    found = replace(report(row("lightnet-n-640.pt", 1)), batch=32, device="0")
    found.environment["gpu"] = "A GPU"
    script.write([("torch", found)], {"tensorrt": "not installed"})
    text = (tmp_path / "gpu_latency.md").read_text()
    # 32 images in 11 ms
    assert "| lightnet-n | 11.00 / 11.98, 2909 a second |" in text
    assert "| model | torch, batch 32 |" in text
    assert "Left out: tensorrt (not installed)." in text
    assert json.loads((tmp_path / "gpu_latency.json").read_text())["gpu"] == "A GPU"


def test_prepost__rows_are_the_predictors(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("prepost", monkeypatch)
    found = script.measure(224, (200, 200), {"objects": 5, "anchors": 4, "blocks": 2})
    assert found["both_ms"] == found["pre_ms"] + found["post_ms"] > 0
    boxes = script.postprocess(script.made_up(224, 5, 4), [(200, 200)], (224, 224), nms=True)[0]
    assert 5 <= len(boxes) <= 20


def test_public__names_and_no_folders() -> None:
    found = public(report(row("/somewhere/private/best.pt", 1), data="/somewhere/private/neu.yaml", files=["/x/y"]))
    assert "private" not in json.dumps(found.to_dict())
    assert (found.rows[0].artifact, found.data) == ("best.pt", "neu.yaml")


def test_neu_table__rows_against_stock_paired_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    table, shown = load("neu_table", monkeypatch), load("neu_rows", monkeypatch)

    def made(student: str, method: str, points: dict[int, float]) -> Row:
        values = {"mAP50-95": list(points.values()), "mAP50": [2 * v for v in points.values()]}
        return Row(student, method, values, [(seed, None) for seed in points], test=values)

    stock = made("yolo26n", "none", {0: 28.0, 1: 30.0, 2: 29.0})
    better = made("lightnet-s", "kd-lightnet", {2: 32.0, 0: 30.0, 1: 34.0})  # another order of seeds, on purpose
    reports = {
        name: CompareReport({}, rows, [], [], [], []) for name, rows in (("stock", [stock]), ("lightnet", [better]))
    }
    text = shown.markdown(reports, "test", (8, 40))
    line = next(line for line in text.splitlines() if "lightnet-s" in line)
    # differences 2, 4, 3: mean 3, sd 1, half width 4.303 / sqrt(3) = 2.48
    assert "| +3.0 | +0.5 to +5.5 |" in line
    assert "| teacher | kd-lightnet | 40 + 8 | 0.91 | 3 | 32.0 ± 2.0 | 64.0 ± 4.0 |" in line
    assert "| yolo26n | COCO | none | 8 | 1.00 | 3 | 29.0 ± 1.0 | 58.0 ± 2.0 |" in text
    assert shown.epochs("surgery", better, (8, 40)) == "8, teacher 40"
    assert shown.cpu_time("yolo11n", made("any", "none", {})) == "1.11"
    assert shown.against(made("x", "none", {7: 30.0}), stock, "test") == ["", ""]
    plain = made("lightnet-s", "none", {0: 31.0, 1: 33.0, 2: 31.0})
    gains = shown.differences({"lightnet": CompareReport({}, [plain, better], [], [], [], [])}, "val")
    # -1, +1, +1: mean 1/3, sd 1.155, half width 2.87
    assert gains.splitlines()[2:] == ["| lightnet-s | teacher | kd-lightnet | none | +0.3 | -2.5 to +3.2 |"]
    assert set(table.PARTS) >= set(table.SHORT["neu_table"]) >= {"stock", "lightnet", "more epochs"}
    setting = {"epochs": 8, "close_mosaic": 2}
    assert table.with_length("lightnet", setting, (8, 40)) == setting
    assert table.with_length("stock long", setting, (8, 40)) == {"epochs": 48, "close_mosaic": 12}
    assert shown.epochs("stock long", stock, (8, 40)) == "48"


def test_neu_rows__distillation_against_labels_and_stock_on_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = load("neu_rows", monkeypatch)

    def made(method: str, test: list[float], val: list[float]) -> Row:
        places: list[tuple[int, int | None]] = [(seed, None) for seed in range(3)]
        return Row("yolo26n", method, {"mAP50-95": val}, places, test={"mAP50-95": test})

    stock = [made("none", [28, 28, 28], [30, 30, 30]), made("score-l2", [29, 30, 31], [30, 31, 32])]
    ours = [made("none", [34, 35, 36], [35, 36, 37]), made("kd-lightnet", [35, 36, 37], [37, 38, 39])]
    reports = {name: CompareReport({}, rows, [], [], [], []) for name, rows in (("stock", stock), ("surgery", ours))}
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in shown.differences(reports, "test").splitlines()
    ]
    assert cells[0][4:] == ["test", "95 % interval", "val", "95 % interval"]
    assert [[*row[2:5], row[6]] for row in cells[2:]] == [
        ["score-l2", "none", "+2.0", "+1.0"],
        ["kd-lightnet", "none", "+1.0", "+2.0"],
        ["none", "stock, score-l2", "+5.0", "+5.0"],
        ["kd-lightnet", "stock, score-l2", "+6.0", "+7.0"],
    ]
    assert shown.differences({"surgery": CompareReport({}, ours[:1], [], [], [], [])}, "test") == ""


def test_neu_across__is_what_the_recipe_page_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load("neu_across", monkeypatch).main()
    found = {line.split("|")[1].strip(): line.split("|")[4:6] for line in capsys.readouterr().out.splitlines()[2:]}
    page = (Path(__file__).resolve().parents[3] / "docs" / "recipe.md").read_text(encoding="utf-8")
    for mean, interval in found.values():
        low, high = interval.strip().split(" to ")
        said = [f"{mean.strip().lstrip('+-')}", f"({low} to {high}", f"({high.lstrip('-')} to {low.lstrip('-')})"]
        assert said[0] in page
        assert said[1] in page or said[2] in page, interval
    assert list(found) == ["lightnet-n, kd-lightnet", "lightnet-s, kd-lightnet", "yolo26n, qarep, kd-lightnet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "weights=: no such file; give a pretrained checkpoint"),
        (["weights=W", "parts=stock", "teacher=/no.pt"], "teacher=/no.pt: no such file"),
        (["weights=W", "parts=stock,yolo11n"], "weights11=: no such file"),
        (["weights=W", "parts=stok"], "parts=stok: unknown; known: stock, lightnet"),
        (["weights=W", "parts=stock", "pages=README.md"], "pages=: pages hold figures of the test split"),
        (["weights=W", "parts=stock", "test=true", "name=odd", "pages=README.md"], "README.md: needs <!-- odd -->"),
        (["weights=W", "parts=stock", "test=true", "pages=NO.md"], "NO.md: no such page"),
        (["epoch=3"], "unknown key 'epoch'"),
    ],
)
def test_neu_table__bad_input_is_one_line_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    table = load("neu_table", monkeypatch)
    (tmp_path / "w.pt").write_bytes(b"weights")
    given = [word.replace("weights=W", f"weights={tmp_path / 'w.pt'}") for word in words]
    monkeypatch.setattr("sys.argv", ["neu_table.py", *given])
    with pytest.raises(SystemExit) as caught:
        table.main()
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_neu_table__seeds_of_a_part_give_way_to_given_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = load("neu_table", monkeypatch)
    asked: list[str] = []

    def split(values: dict[str, object]) -> tuple[None, dict[str, object]]:
        asked.append(str(values["seeds"]))
        return None, {}

    monkeypatch.setattr(table, "split_compare_keys", split)
    monkeypatch.setattr(table, "compare", lambda keys, stock: CompareReport({}, [], [], [], [], []))
    for given in (False, True):
        own = {"seeds_given": given, "test": False}
        table.run("more epochs", {"teacher": "t.pt"}, {"seeds": "0,1,2,3,4"}, tmp_path, own)
    assert asked == ["0,1,2", "0,1,2,3,4"]


def test_run_of__is_named_by_the_content_of_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_of = load("single_runs", monkeypatch).run_of
    weights = tmp_path / "a.pt"
    weights.write_bytes(b"one")
    copy = tmp_path / "b.pt"
    copy.write_bytes(b"one")

    def name(**arguments: object) -> str:
        return str(run_of("x", {"model": str(weights), "seed": 0, **arguments}, tmp_path).name)

    assert name() == name(model=str(copy)) == name(device=0)
    assert len({name(), name(seed=1), name(epochs=9), name(data="neu")}) == 4
    weights.write_bytes(b"two")
    assert name() != name(model=str(copy))
    before = name(), name(method="none")
    monkeypatch.setattr(sys.modules["single_runs"], "narrowed_defaults", lambda: {"mosaic": 1.0})
    assert name() != before[0]  # another default recipe is another run ...
    assert name(method="none") == before[1]  # ... but not of plain training


def test_teacher_keys__are_those_of_a_teacher_that_a_run_trains_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: Path
) -> None:
    single_runs = load("single_runs", monkeypatch)
    model = DetectionModel("yolo26n.yaml", nc=80, verbose=False)
    torch.save({"epoch": -1, "model": model.half(), "ema": None, "train_args": {}}, tmp_path / "yolo26n.pt")
    given = single_runs.teacher_keys(str(tmp_path / "yolo26n.pt"), str(tiny_data), 40)
    split_train_keys({"data": str(tiny_data), **given})  # refuses what train does not know
    assert (given["teacher"], given["method"], given["epochs"]) == ("none", "none", 40)
    assert (given["mosaic"], given["nbs"], given["close_mosaic"]) == (0.0, 32, 0)
    monkeypatch.setattr(single_runs, "finetuned_defaults", lambda *_, **__: {"nbs": 32})
    given = single_runs.teacher_keys(str(tmp_path / "yolo26n.pt"), str(tiny_data), 40)
    assert given["close_mosaic"] == 10
    assert "mosaic" not in given
