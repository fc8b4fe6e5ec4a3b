"""What the package is made of: its manifest, which part may import which, sizes, and nothing of the maker's machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there too

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
SKIPPED_FOLDERS = {"__pycache__"}
COPIED = "bundle_files"  # Python that is copied into a bundle and runs there: data of the package, no modules of it

# The parts of the package from the ground up. A part may import itself and every part on a lower line, never a
# neighbour on its own line. A part is a module kd_yolo/NAME.py or a package kd_yolo/NAME/, export/, cfg/.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"version", "errors", "cfg"}),  # "version": kd_yolo/__init__.py, as far as it is __version__
    frozenset({"resources", "files", "tables"}),
    # outside input: keys and YAML, .pt files, their origin, devices
    frozenset({"config", "checkpoints", "provenance", "devices"}),
    frozenset({"data", "nn", "targets", "measured"}),
    frozenset({"images", "inference"}),  # what a detector looks at, and what it says
    frozenset({"anomaly"}),  # networks, data and metrics of task=anomaly; used by what runs, times and exports them
    frozenset({"runtimes"}),  # what runs an exported file
    frozenset({"bench"}),
    frozenset({"distill"}),
    frozenset({"tasks"}),
    frozenset({"pretrain"}),  # a student's start from unlabeled images
    frozenset({"deployed"}),  # what the deployed files of all tasks are reported with
    frozenset({"deploy", "classify"}),
    frozenset({"export"}),  # what is exported is the deployed form
    frozenset({"training"}),
    frozenset({"api", "doctor", "data_commands", "start_commands", "compare"}),
    frozenset({"inspection"}),  # judging and looking at images with anomaly models, beside detectors or alone
    frozenset({"demo", "command_keys", "command_help"}),
    frozenset({"commands", "info_commands", "command_table"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# Parts that the table may name before they exist: design.md plans them.
PLANNED: set[str] = set()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources() -> dict[str, Path]:
    """Return the file of every module that ships, by its name as it is imported."""
    found: dict[str, Path] = {}
    for top in ("kd_yolo", "export", "cfg"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = parts if top == "kd_yolo" else ["kd_yolo", *parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part_of(module: str) -> str:
    words = module.split(".")
    return words[1] if len(words) > 1 else "kd_yolo"


def imported(source: str, parts: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and part of every import of ours in a source text, those inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "kd_yolo":
                    yield node.lineno, alias.name.partition(".")[2].split(".")[0] or "version"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide what is imported"
            words = (node.module or "").split(".")
            if words[0] == "kd_yolo" and len(words) > 1:
                yield node.lineno, words[1]
            elif words == ["kd_yolo"]:
                for alias in node.names:
                    known = {"__version__": "version", "KDYOLO": "api"}
                    yield node.lineno, known.get(alias.name, alias.name if alias.name in parts else "unknown")


def violations(part: str, source: str, where: str) -> list[str]:
    """Return what a source text imports that its part may not."""
    found = []
    for line, target in imported(source, set(RANK)):
        if target != part and not RANK.get(target, len(LAYERS)) < RANK[part]:
            found.append(f"{where}:{line}: {part} imports {target}")
    return found


# ---- manifest --------------------------------------------------------------------------------------------------------


def test_packages__list_equals_the_folders(project: dict[str, Any]) -> None:
    settings = project["tool"]["setuptools"]
    home = {name: Path(folder) for name, folder in settings["package-dir"].items()}
    folders = {"kd_yolo": ROOT / "kd_yolo", **{name: ROOT / folder for name, folder in home.items()}}
    on_disk = set()
    for name, folder in folders.items():
        for file in [folder / "__init__.py", *folder.rglob("*/__init__.py")]:
            assert file.is_file(), file
            on_disk.add(".".join([name, *file.parent.relative_to(folder).parts]))
    assert settings["packages"] == sorted(on_disk)


def test_packages__every_python_file_is_in_one(project: dict[str, Any]) -> None:
    """A folder without ``__init__.py`` works in an editable install and is missing from the wheel."""
    packages = set(project["tool"]["setuptools"]["packages"])
    modules = {module: path for module, path in sources().items() if path.parent.name != COPIED}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        assert package in packages, f"{path.relative_to(ROOT)} is in no package of pyproject.toml"


def test_package_data__every_other_file_ships(project: dict[str, Any]) -> None:
    settings = project["tool"]["setuptools"]
    assert settings["include-package-data"] is False  # then only what package-data names ships
    folders = {"kd_yolo": ROOT / "kd_yolo", "kd_yolo.export": ROOT / "export", "kd_yolo.cfg": ROOT / "cfg"}
    for package, folder in folders.items():
        files = {
            path
            for path in folder.rglob("*")
            if path.is_file()
            and (path.suffix not in {".py", ".pyc"} or path.parent.name == COPIED)
            and not SKIPPED_FOLDERS & set(path.parts)
        }
        shipped = {path for pattern in settings["package-data"].get(package, []) for path in folder.glob(pattern)}
        assert files == shipped & files, f"not shipped: {sorted(str(path) for path in files - shipped)}"
    yamls = list((ROOT / "cfg").rglob("*.yaml"))
    assert {path.parent.name for path in yamls} >= {"models", "methods", "datasets"}
    assert not list((ROOT / "cfg").rglob("*.yml")), "the package looks for .yaml only"


def test_manifest__version_script_and_python(project: dict[str, Any]) -> None:
    import kd_yolo
    from kd_yolo.cli import main

    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kd_yolo.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", kd_yolo.__version__)
    assert project["project"]["scripts"] == {"kd-yolo": f"{main.__module__}:{main.__name__}"}
    assert f"## [{kd_yolo.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_extras__all_leaves_out_what_the_public_index_lacks(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.findall(r"[a-z]+", everything.partition("[")[2]))
    assert named == set(extras) - {"all", "dev", "tensorrt"}
    assert not any("tensorrt" in requirement for requirement in extras["dev"])


# ---- import direction ------------------------------------------------------------------------------------------------


def test_layers__name_every_part_once() -> None:
    listed = [part for parts in LAYERS for part in parts]
    assert len(listed) == len(set(listed))
    on_disk = {part_of(module) for module in sources()} - {"kd_yolo"}
    assert on_disk - set(listed) == set(), "give the new part its place in LAYERS"
    assert set(listed) - on_disk - {"version"} <= PLANNED, "LAYERS names a part that is gone"


def test_layers__imports_go_down_only() -> None:
    found: list[str] = []
    for module, path in sources().items():
        if module != "kd_yolo":  # it holds the version for all, and KDYOLO on first use
            found += violations(part_of(module), path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    assert found == []


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("nn", "from kd_yolo.distill.base import Taps"),
        ("nn", "import kd_yolo.distill.model as model"),
        ("data", "def f():\n    from kd_yolo.nn import blocks"),
        ("distill", "if TYPE_CHECKING:\n    from kd_yolo.tasks.detect import KDTrainer"),
        ("deploy", "from kd_yolo.export import export"),
        ("tasks", "from kd_yolo import KDYOLO"),
        ("errors", "from kd_yolo import files"),
        ("bench", "from kd_yolo.a_part_that_nobody_placed import x"),
    ],
)
def test_violations__import_upwards(part: str, line: str) -> None:
    assert len(violations(part, line, "twin")) == 1
    assert violations("training", "import kd_yolo\nfrom kd_yolo.errors import DataError", "twin") == []


def test_root__imports_nothing_at_module_level() -> None:
    """``import kd_yolo`` must stay free: the command line's help waits for it."""
    tree = ast.parse((ROOT / "kd_yolo" / "__init__.py").read_text(encoding="utf-8"))
    modules = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert modules == ["__future__", "typing"]
    assert not any(isinstance(node, ast.Import) for node in tree.body)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes__files_and_functions() -> None:
    long = []
    for path in sources().values():
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno}: {node.name} has {lines} lines")
    assert long == []


# ---- nothing of the maker's machine ----------------------------------------------------------------------------------

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$})-])/(?:work|root|opt|farm)(?:/|\b(?![\w.-]))")
REGISTRY_HOST = re.compile(
    r"\b(?:[\w-]+\.)*(?:py" + r"pi\.org|pythonhosted\.org|npm" + r"js\.org|pypi\.[\w.]+|conda\.anaconda\.org|"
    r"proxy\.golang\.org|docker\.io|ghcr\.io)\b",
    re.IGNORECASE,
)


def tracked_texts() -> Iterator[tuple[Path, str]]:
    """Yield every text file that git tracks or would add."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        path = ROOT / name
        if name and path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                yield path, content.decode("utf-8")


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine path", "registry host"])
def test_tracked_files__speak_of_no_machine(pattern: re.Pattern[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    assert found == []


def test_patterns__match_what_they_should() -> None:
    for text in ("see /" + "work/main", "'/" + "root'", "PATH=/" + "opt/env/bin", "(/" + "farm/cache)"):
        assert MACHINE_PATH.search(text), text
    for text in ("runs/work/x", "https://host/workbench", "lr0/lrf", "../opt/x", "/optics"):
        assert not MACHINE_PATH.search(text), text
    for text in ("https://py" + "pi.org/simple", "files.python" + "hosted.org", "py" + "pi.nvidia.com"):
        assert REGISTRY_HOST.search(text), text
    assert not REGISTRY_HOST.search("pip install kd-yolo; pypi classifiers")
