"""The wheel: what is in it, and that it works away from the sources. docs/CONTRIBUTING.md has the demo run by hand."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"kd_yolo": "kd_yolo", "export": "kd_yolo/export", "cfg": "kd_yolo/cfg"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy: setuptools leaves a build folder, whose stale files would go into the next wheel."""
    missing = [name for name in ("build", "setuptools") if importlib.util.find_spec(name) is None]
    assert not missing, f"the wheel is built with {', '.join(missing)}; run: pip install -e '.[dev]'"
    assert int(version("setuptools").split(".")[0]) >= 77, "pyproject.toml needs setuptools>=77 to build"
    source = tmp_path_factory.mktemp("source")
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the wheel is installed in, without its dependencies, which come from this environment."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True)
    return target


def run(installed: Path, folder: Path, *words: str) -> str:
    """Run Python on the installed wheel from a folder that holds no sources; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "KD_YOLO_DATA", "KD_YOLO_SHARED"}}
    environment |= {"PYTHONPATH": str(installed), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    environment["OMP_NUM_THREADS"] = "1"  # two spinning threads on a busy machine take ten times as long
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel__content_equals_the_sources(wheel: Path) -> None:
    expected = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in SHIPPED.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.split("/")[0] for name in names} == {"kd_yolo", wheel.name.split("-py3")[0] + ".dist-info"}
    assert {name for name in names if name.startswith("kd_yolo/")} == expected
    assert "kd_yolo/py.typed" in expected
    assert {name for name in expected if name.endswith(".yaml")} >= {
        "kd_yolo/cfg/models/lightnet-s.yaml",
        "kd_yolo/cfg/methods/kd-lightnet.yaml",
        "kd_yolo/cfg/datasets/neu.yaml",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "License-Expression: AGPL-3.0-only" in metadata
    assert "Requires-Dist: ultralytics" in metadata


def test_wheel__is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    """An editable install lies in the same environment: without this check the tests below could read the sources."""
    code = "import kd_yolo, kd_yolo.cfg as c, kd_yolo.export as e; print(kd_yolo.__file__, c.__file__, e.__file__)"
    files = run(installed, tmp_path, "-c", code).split()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(installed) for file in files), files


def test_wheel__imports_every_module(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, kd_yolo\n"
        "found = pkgutil.walk_packages(kd_yolo.__path__, 'kd_yolo.')\n"
        "names = [m.name for m in found if not m.name.endswith('__main__')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))"
    )
    modules = [p for folder in SHIPPED for p in (ROOT / folder).rglob("*.py") if p.name != "__main__.py"]
    modules = [path for path in modules if path.parent.name != "bundle_files"]  # runs in a bundle only
    last_line = run(installed, tmp_path, "-c", code).splitlines()[-1]
    assert int(last_line) == len(modules) - 1  # the root package is not in its own list


def test_wheel__commands_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert "usage: kd-yolo COMMAND" in run(installed, tmp_path, "-m", "kd_yolo", "--help")
    models = json.loads(run(installed, tmp_path, "-m", "kd_yolo", "models", "json=true"))["models"]
    assert {row["model"] for row in models} == {path.stem for path in (ROOT / "cfg" / "models").glob("*.yaml")}
    methods = json.loads(run(installed, tmp_path, "-m", "kd_yolo", "methods", "json=true"))["methods"]
    single = {row["method"] for row in methods if "+" not in row["method"]}
    assert single == {path.stem for path in (ROOT / "cfg" / "methods").glob("*.yaml")}
    assert not any(tmp_path.iterdir()), "a listing left files in the working folder"
