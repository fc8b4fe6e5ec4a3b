"""Several processes train one student: what Ultralytics starts for many GPUs, and torchrun on two machines.

There is no GPU here: ``gloo_shim.py`` says what of Ultralytics' trainer has to be replaced for that.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from ultralytics.utils.dist import ddp_cleanup, generate_ddp_command

from kd_yolo.config import Recipe
from kd_yolo.errors import ConfigError
from kd_yolo.files import sha256
from kd_yolo.images import dataset_files
from kd_yolo.tasks.detect import KDTrainer

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "multi-gpu.md"


def run_all(commands: Sequence[Sequence[str]], seen: Path) -> list[dict[str, Any]]:
    """Start launchers side by side, wait, and return what each training process saw."""
    seen.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KD_YOLO_SEEN": str(seen), "YOLO_VERBOSE": "false"}
    started = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return [json.loads(file.read_text()) for file in sorted(seen.glob("*.json"))]


def check_processes(seen: list[dict[str, Any]], data: Path, batch: int, epochs: int) -> None:
    """Check that two processes trained one model, each on its own part."""
    assert len(seen) == 2
    assert all(one["world_size"] == 2 for one in seen)
    assert all(one["batch"] == batch // 2 for one in seen)
    assert all("find_unused_parameters" in one["ddp"] for one in seen)
    assert seen[0]["recipe"] == seen[1]["recipe"]
    assert all(value > 0 for one in seen for value in one["kd"].values())
    assert seen[0]["student"] == seen[1]["student"]  # the same weights after the last step ...
    assert seen[0]["method"] == seen[1]["method"]
    assert seen[0]["labelled"] != seen[1]["labelled"]  # ... of different images
    every = sorted(file.name for file in dataset_files(data, "train"))
    assert sorted(seen[0]["labelled"] + seen[1]["labelled"]) == sorted(every * epochs)


@pytest.fixture
def replay(tiny_teacher: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., KDTrainer]:
    def build(**given: Any) -> KDTrainer:
        keys = {"teacher": str(tiny_teacher), "teacher_sha256": sha256(tiny_teacher), "method": "score-l2"}
        content = Recipe(**{**keys, "schedule": {"warmup": 0.0}, **given})
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content.model_dump()))
        stock = {"model": "yolo26n.yaml", "pretrained": False, "data": str(tiny_data), "imgsz": 64, "batch": 8}
        stock |= {"epochs": 1, "plots": False, "device": "cpu", "project": str(tmp_path), "name": "run", "nbs": 8}
        stock |= {"exist_ok": True, "close_mosaic": 0, "distill_model": str(tmp_path / "recipe.yaml")}
        return KDTrainer(overrides=stock)

    return build


def test_ddp_command__its_processes_train_with_the_recipe(
    replay: Callable[..., KDTrainer], tiny_data: Path, tmp_path: Path
) -> None:
    """What Ultralytics writes for its workers is run as it stands; the images without labels are shared out too."""
    folder = dataset_files(tiny_data, "train")[0].parent
    trainer = replay(unlabeled=str(folder), unlabeled_ratio=0.5)
    trainer.world_size = 2  # what device=0,1 gives
    command, file = generate_ddp_command(trainer)
    try:
        assert command[-1] == file
        seen = run_all([[*command[:-1], str(HERE / "gloo_shim.py"), file]], tmp_path / "seen")
    finally:
        ddp_cleanup(trainer, file)
    check_processes(seen, tiny_data, batch=8, epochs=1)
    assert trainer.recipe is not None
    assert seen[0]["recipe"] == trainer.recipe.model_dump()
    assert all(one["trainer"] == "KDTrainer" for one in seen)
    drawn = [one["unlabeled"] for one in seen]
    assert [len(images) for images in drawn] == [6, 6]  # 2 beside each batch of 4, 3 batches
    assert not set(drawn[0]) & set(drawn[1])
    header, row = (line.split(",") for line in (tmp_path / "run" / "results.csv").read_text().splitlines())
    assert float(dict(zip(header, row, strict=True))["train/kd_feat_loss"]) > 0
    assert (tmp_path / "run" / "weights" / "last.pt").is_file()


def code_block(title: str) -> str:
    """Return the Python block of the documentation that begins with a comment naming the file."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {title}")]
    return str(found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_torchrun__two_machines_train_the_documented_script(
    tiny_teacher: Path, tiny_layout: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Two launchers with one process each, as on two machines: both have local rank 0."""
    for name in ("prepare.py", "node.py"):
        (tmp_path / name).write_text(code_block(name), encoding="utf-8")
    run = tmp_path / "run"
    prepare = [
        sys.executable,
        str(tmp_path / "prepare.py"),
        f"run={run}",
        f"model={tiny_layout}",
        f"teacher={tiny_teacher}",
    ]
    subprocess.run([*prepare, "method=score-l2", "pretrained=false"], check=True, timeout=200)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    script = [str(HERE / "gloo_shim.py"), str(tmp_path / "node.py"), f"run={run}", f"data={tiny_data}", "device=cpu"]
    script += ["imgsz=64", "batch=8", "epochs=1", "plots=false", "close_mosaic=0"]
    commands = [[*launcher, f"--node_rank={node}", *script] for node in range(2)]
    seen = run_all(commands, tmp_path / "seen")
    check_processes(seen, tiny_data, batch=8, epochs=1)
    assert seen[0]["recipe"]["method"] == "score-l2"
    assert (run / "student" / "weights" / "last.pt").is_file()
    assert not (run / "student2").exists()


def test_trainer__several_processes_without_a_gpu_are_refused_in_one_line(replay: Callable[..., KDTrainer]) -> None:
    trainer = replay()
    trainer.world_size = 2
    with pytest.raises(ConfigError, match=r"device=cpu: .* need a GPU each"):
        trainer.train()
