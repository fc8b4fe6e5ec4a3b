from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_factory import save_checkpoint, tiny_dataset, tiny_detector
from ultralytics import YOLO

import kd_yolo.deploy as deploy_module
from kd_yolo.checkpoints import load_model
from kd_yolo.deploy import DeployReport, deploy
from kd_yolo.errors import CheckpointError, ConfigError, OutputError, ReparamError
from kd_yolo.files import sha256
from kd_yolo.images import textured_images, to_canvas
from kd_yolo.inference import count_parameters, deployed_form, detections, raw_outputs, use_head

# Run where kd_yolo cannot be imported, as on a machine with nothing but ultralytics.
WITHOUT_KD_YOLO = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kd_yolo":
            raise ImportError("kd_yolo is not installed here")

sys.meta_path.insert(0, Absent())
try:
    import kd_yolo
except ImportError:
    pass
else:
    raise SystemExit("kd_yolo could be imported")

import numpy as np
from ultralytics import YOLO

weights, images, out, nms = sys.argv[1:]
keys = {"imgsz": 64, "conf": 0.05, "rect": False, "device": "cpu", "verbose": False}
found = YOLO(weights).predict(list(np.load(images)), nms=None if nms == "nms" else False, **keys)
np.savez(out, **{str(i): result.boxes.data.numpy() for i, result in enumerate(found)})
"""


@pytest.fixture(scope="module", params=["nms", "nms-free"])
def deployed(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> DeployReport:
    out = tmp_path_factory.mktemp("deployed") / "small.pt"
    return deploy(tiny_checkpoint, out=out, nms=request.param == "nms")


def test_deploy__report_and_json(deployed: DeployReport, tiny_checkpoint: Path) -> None:
    content = json.loads(deployed.provenance.read_text())
    assert content == json.loads(json.dumps(deployed.to_dict()))
    assert content["source_sha256"] == sha256(tiny_checkpoint)
    assert content["sha256"] == sha256(deployed.path)
    assert content["merge"]["blocks"] == deployed.merge.blocks > 5
    assert 0 <= content["merge"]["relative_error"] < 1e-9
    assert content["names"] == {"0": "scratch", "1": "dent", "2": "stain"}
    assert set(content["versions"]) >= {"kd_yolo", "ultralytics", "torch"}
    assert content["recipe"] is None
    assert deployed.box_error_px < deployed.box_tolerance_px
    for text in (deployed.to_text(), deployed.to_markdown()):
        assert str(deployed.path) in text


def test_deploy__counts_are_true(deployed: DeployReport) -> None:
    plain = tiny_detector(form=None)
    use_head(plain, deployed.head == "nms")
    plain.fuse(verbose=False)
    assert deployed.params_fused == count_parameters(plain)
    loaded, _ = load_model(deployed.path)
    assert deployed.params == count_parameters(loaded)
    assert deployed.params_trained == count_parameters(tiny_detector())
    assert deployed.convolutions < deployed.convolutions_trained
    assert count_parameters(loaded.fuse(verbose=False)) == deployed.params_fused


def test_deploy__checkpoint_as_ultralytics_leaves_it(deployed: DeployReport) -> None:
    checkpoint = torch.load(deployed.path, weights_only=False)
    model = checkpoint["model"]
    assert type(model).__module__ == "ultralytics.nn.tasks"
    assert checkpoint["epoch"] == -1
    assert checkpoint["optimizer"] is None
    assert checkpoint["ema"] is None
    assert isinstance(model.args, dict)
    assert model.args["imgsz"] == checkpoint["train_args"]["imgsz"] == 64
    assert "kd_yolo" not in model.yaml
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    kept, gone = ("cv2", "one2one_cv2") if deployed.head == "nms" else ("one2one_cv2", "cv2")
    assert getattr(model.model[-1], kept) is not None
    assert getattr(model.model[-1], gone) is None


def test_deploy__raw_outputs_equal_the_training_form(deployed: DeployReport, tiny_checkpoint: Path) -> None:
    source, _ = load_model(tiny_checkpoint)
    use_head(source, deployed.head == "nms")
    pixels = to_canvas(textured_images(8, seed=5), (64, 96)).double()
    loaded, _ = load_model(deployed.path)
    apart = raw_outputs(source.double(), pixels).difference(raw_outputs(loaded.double(), pixels))
    assert apart.box < 1e-4
    assert apart.score < 1e-5


def test_deploy__loads_without_kd_yolo_and_restricted(
    deployed: DeployReport, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    images = textured_images(6, (64, 64), seed=3)
    np.save(tmp_path / "images.npy", np.stack(images))
    script = tmp_path / "elsewhere.py"
    script.write_text(WITHOUT_KD_YOLO)
    arguments = [deployed.path, tmp_path / "images.npy", tmp_path / "found.npz", deployed.head]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "ULTRALYTICS_SAFE_LOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "found.npz")
    source, _ = load_model(tiny_checkpoint)
    nms = deployed.head == "nms"
    use_head(source, nms)
    expected = detections(raw_outputs(source, to_canvas(images, (64, 64))), nms, confidence=0.05)
    assert sum(map(len, expected)) > 50
    for index, rows in enumerate(expected):
        rows[:, :4] = rows[:, :4].clamp(0, 64)  # predict clips to the image
        other = torch.from_numpy(found[str(index)])
        assert rows.shape == other.shape
        assert float((rows[:, :4] - other[:, :4]).abs().max()) < 1e-4
        assert float((rows[:, 4] - other[:, 4]).abs().max()) < 1e-5
        assert torch.equal(rows[:, 5], other[:, 5])


def test_deploy__training_form_does_not_load_without_kd_yolo(tiny_checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.stack(textured_images(1, (64, 64))))
    script = tmp_path / "elsewhere.py"
    script.write_text(WITHOUT_KD_YOLO)
    arguments = [tiny_checkpoint, tmp_path / "images.npy", tmp_path / "found.npz", "nms"]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "kd_yolo" in done.stderr


def test_deploy__validates_and_fuses_as_stock(deployed: DeployReport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "set")
    keys: dict[str, Any] = {
        "data": str(data),
        "imgsz": 64,
        "rect": False,
        "plots": False,
        "verbose": False,
        "workers": 0,
    }
    nms = None if deployed.head == "nms" else False
    results = [
        YOLO(path).val(**keys, nms=nms, device="cpu", project=str(tmp_path), name=str(index)).results_dict
        for index, path in enumerate((tiny_checkpoint, deployed.path))
    ]
    assert results[0]["metrics/mAP50(B)"] == pytest.approx(results[1]["metrics/mAP50(B)"], abs=1e-6)
    assert results[0]["metrics/mAP50-95(B)"] == pytest.approx(results[1]["metrics/mAP50-95(B)"], abs=1e-6)
    stock = YOLO(deployed.path)
    stock.fuse()
    assert sum(p.numel() for p in stock.model.parameters()) == deployed.params_fused


def test_deploy__again_gives_the_same_network(deployed: DeployReport, tmp_path: Path) -> None:
    nms = deployed.head == "nms"
    again = deploy(deployed.path, out=tmp_path / "again.pt", nms=nms)
    assert again.merge.blocks == 0
    assert again.params == deployed.params
    with pytest.raises(ConfigError, match=r"small\.pt: (has no NMS-free|keeps only its NMS-free)"):
        deploy(deployed.path, out=tmp_path / "other.pt", nms=not nms)


def test_deploy__stock_model_without_blocks(tmp_path: Path) -> None:
    path = save_checkpoint(tiny_detector(form=None, both_heads=False), tmp_path / "stock.pt")
    report = deploy(path)
    assert report.path == tmp_path / "stock-deploy.pt"
    assert report.merge.blocks == 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["stock-deploy.json", "stock-deploy.pt", "stock.pt"]
    with pytest.raises(ConfigError, match=r"stock\.pt: has no NMS-free"):
        deploy(path, nms=False)


def test_deploy__half_precision_source(tmp_path: Path) -> None:
    """Best.pt is stored in float16; its values are exact in float32, and the merged kernels are not rounded back."""
    path = save_checkpoint(tiny_detector().half(), tmp_path / "best.pt")
    assert deploy(path).box_error_px < 1e-4


@pytest.mark.parametrize("where", ["run folder", "recorded"])
def test_deploy__recipe_of_the_run(tmp_path: Path, where: str) -> None:
    recipe = tmp_path / ("run" if where == "run folder" else "elsewhere") / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("kd_yolo: 1\nmethod: kd-lightnet\nteacher: t.pt\nteacher_sha256: ab\n")
    recorded = {"distill_model": str(recipe)} if where == "recorded" else {}
    source = save_checkpoint(
        tiny_detector(), tmp_path / "run" / "weights" / "best.pt", train_args={"imgsz": 64, **recorded}
    )
    report = deploy(source)
    assert report.recipe is not None
    assert report.recipe["method"] == "kd-lightnet"
    assert load_model(report.path)[0].args["distill_model"] is None


def test_deploy__a_wrong_weight_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = deployed_form

    def corrupt(*args: Any) -> Any:
        model, report = right(*args)
        model.model[0].conv.weight.data[0, 0, 1, 1] += 0.01
        return model, report

    monkeypatch.setattr(deploy_module, "deployed_form", corrupt)
    with pytest.raises(ReparamError, match=r"differs from the trained one by .* px .*; nothing was written"):
        deploy(tiny_checkpoint, out=tmp_path / "wrong.pt")
    assert not list(tmp_path.iterdir())


def test_deploy__blocks_left_in_the_file_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = deployed_form
    monkeypatch.setattr(deploy_module, "deployed_form", lambda model, *rest: (model, right(model, *rest)[1]))
    with pytest.raises(ReparamError, match=r"still refers to kd_yolo\.nn\.blocks\.RepBlock"):
        deploy(tiny_checkpoint, out=tmp_path / "wrong.pt")
    assert not list(tmp_path.iterdir())


def test_deploy__full_disk_leaves_the_old_file(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small.pt"
    out.write_bytes(b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"small\.pt: cannot be written \(No space left"):
        deploy(tiny_checkpoint, out=out)
    assert [item.name for item in tmp_path.iterdir()] == ["small.pt"]
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("best.onnx", ConfigError, "ends in .pt"),
        ("SOURCE", ConfigError, "is the trained checkpoint itself"),
        ("file/below.pt", OutputError, "cannot create this folder"),
    ],
)
def test_deploy__bad_out(tiny_checkpoint: Path, tmp_path: Path, out: str, error: type[Exception], message: str) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tiny_checkpoint if out == "SOURCE" else tmp_path / out
    with pytest.raises(error, match=message):
        deploy(tiny_checkpoint, out=target)


def test_deploy__missing_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such file"):
        deploy(tmp_path / "gone.pt")
