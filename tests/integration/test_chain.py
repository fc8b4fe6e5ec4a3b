"""Chains of distillations: who teaches whom, the control, stopping and going on, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_yolo.checkpoints import load_model
from kd_yolo.config import TrainConfig, read_recipe, split_train_keys
from kd_yolo.errors import ConfigError, TeacherError
from kd_yolo.files import sha256
from kd_yolo.tasks import chain as chain_module
from kd_yolo.tasks.chain import chain_of, is_ready_teacher, stage_name
from kd_yolo.tasks.phases import PhaseResult, run_phase
from kd_yolo.training import train


def keys_of(train_keys: Callable[..., dict[str, Any]], chain: str, **given: Any) -> dict[str, Any]:
    keys = train_keys(chain=chain, epochs=1, allow_weak_teacher=True, **given)
    keys.pop("model")
    return keys


def taught_by(run_dir: Path, phase: str) -> str | list[str] | None:
    recipe = read_recipe(run_dir / f"{phase}.recipe.yaml")
    return None if recipe is None else recipe.teacher_sha256


def test_train__chain_teaches_stage_by_stage_and_goes_on_where_it_stopped(
    train_keys: Callable[..., dict[str, Any]], tiny_layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def stopping(run_dir: Path, spec: Any, plan: Any) -> PhaseResult:
        if spec.name == "stage3-lightnet-tiny" and "stopped" not in ran:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(spec.name)
        return run_phase(run_dir, spec, plan)

    monkeypatch.setattr(chain_module, "run_phase", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(*split_train_keys(keys_of(train_keys, f"{tiny_layout},yolo26n.yaml,{tiny_layout}")))
    run_dir = tmp_path / "run"
    first = sha256(run_dir / "stage1-lightnet-tiny" / "weights" / "best.pt")
    assert ran == ["stage1-lightnet-tiny", "stage2-yolo26n", "direct", "stopped"]
    report = train(*split_train_keys({"data": "resumed", "resume": str(run_dir)}))
    names = ["stage1-lightnet-tiny", "stage2-yolo26n", "direct", "stage3-lightnet-tiny"]
    assert [phase.name for phase in report.phases] == names
    assert sha256(run_dir / "stage1-lightnet-tiny" / "weights" / "best.pt") == first  # not trained again
    assert read_recipe(run_dir / "stage1-lightnet-tiny.recipe.yaml") is None
    assert taught_by(run_dir, "stage2-yolo26n") == first == taught_by(run_dir, "direct")
    second = next(p for p in report.phases if p.name == "stage2-yolo26n").best_sha256
    assert taught_by(run_dir, "stage3-lightnet-tiny") == second == sha256(run_dir / "stage2-yolo26n/weights/best.pt")
    assert sha256(report.best) == report.phases[-1].best_sha256
    assert type(load_model(report.best)[0]).__name__ == "DetectionModel"


def test_train__chain_from_a_trained_teacher(
    train_keys: Callable[..., dict[str, Any]], tiny_teacher: Path, tiny_layout: str
) -> None:
    chain = ",".join([str(tiny_teacher), tiny_layout, tiny_layout])
    report = train(*split_train_keys(keys_of(train_keys, chain, method="score-l2")))
    assert [p.name for p in report.phases] == ["stage2-lightnet-tiny", "direct", "stage3-lightnet-tiny"]
    assert taught_by(report.run_dir, "stage2-lightnet-tiny") == sha256(tiny_teacher)


def test_chain__class_list_that_changes_is_refused(tiny_teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    names = list(load_model(tiny_teacher)[0].names.values())
    other.write_text(f"path: .\ntrain: x\nval: x\nnames: {[names[0], 'rust']}\n")
    with pytest.raises(TeacherError, match=r"class list must stay the same"):
        is_ready_teacher(str(tiny_teacher), other)
    other.write_text("path: .\ntrain: x\nval: x\nnames: [rust, moss]\n")
    assert not is_ready_teacher(str(tiny_teacher), other)  # a stranger such as a COCO checkpoint is a warm start
    assert is_ready_teacher(str(tiny_teacher), tiny_data)
    assert not is_ready_teacher("lightnet-n", tiny_data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chain": "a,b"}, "a teacher, at least one assistant and a student"),
        ({"chain": "a,b,c", "model": "lightnet-n"}, "drop model="),
        ({"chain": "a,b,c", "teacher": "x.pt"}, "drop teacher="),
        ({"chain": "a,b,c", "generations": 2}, "drop generations="),
        ({"chain": "a,b,c", "method": "none"}, "made of distillations"),
    ],
)
def test_chain_of__refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chain_of(TrainConfig(data="x", **given))


def test_chain_of__words_and_lists() -> None:
    assert chain_of(TrainConfig(data="x")) == []
    assert chain_of(TrainConfig(data="x", chain="a, b,c")) == chain_of(TrainConfig(data="x", chain=["a", "b", "c"]))
    assert stage_name(1, "some/where/my model.yaml") == "stage2-my-model"
