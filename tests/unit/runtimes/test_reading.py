"""Metadata read from the bytes: round trips, and damage of every kind."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import onnx
import pytest
from exported_factory import exported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd_yolo.errors import ModelError
from kd_yolo.runtimes.reading import check_file, folder_file, onnx_metadata, torchscript_metadata, yaml_metadata

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@pytest.fixture(scope="module")
def onnx_file() -> Path:
    return exported("onnx")


def read_or_message(path: Path) -> dict[str, str] | str:
    try:
        return onnx_metadata(path)
    except ModelError as error:
        return str(error)


def graph_with(entries: dict[str, str]) -> onnx.ModelProto:
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:]))
    onnx.helper.set_model_props(model, entries)
    return model


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.dictionaries(TEXT, TEXT, max_size=6))
def test_onnx_metadata__round_trip(entries: dict[str, str], tmp_path: Path) -> None:
    """Against the onnx package, which has its own reader of the same encoding."""
    path = tmp_path / "x.onnx"
    onnx.save(graph_with(entries), path)
    assert onnx_metadata(path) == entries == {item.key: item.value for item in onnx.load(path).metadata_props}


def test_onnx_metadata__of_a_real_file(onnx_file: Path) -> None:
    assert onnx_metadata(onnx_file) == {item.key: item.value for item in onnx.load(onnx_file).metadata_props}


def test_onnx_metadata__cut_anywhere(onnx_file: Path, tmp_path: Path) -> None:
    """A cut is an error, or between two fields, where the rest is a shorter file of its own kind."""
    content, path = onnx_file.read_bytes(), tmp_path / "cut.onnx"
    whole = onnx_metadata(onnx_file)
    refused = 0
    for size in random.Random(0).sample(range(1, len(content)), 200):
        path.write_bytes(content[:size])
        found = read_or_message(path)
        refused += isinstance(found, str)
        assert isinstance(found, str) or found.items() < whole.items()
    assert refused > 190


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=64))
def test_onnx_metadata__garbage(content: bytes, tmp_path: Path) -> None:
    """Whatever the bytes are: a mapping, or the one error that names the file."""
    path = tmp_path / "garbage.onnx"
    path.write_bytes(content)
    found = read_or_message(path)
    assert isinstance(found, dict) or (found.startswith(f"{path}: ") and "\n" not in found)


def test_onnx_metadata__text_file(tmp_path: Path) -> None:
    path = tmp_path / "page.onnx"
    path.write_text("<!DOCTYPE html><html>404 not found</html>")
    with pytest.raises(ModelError, match=r"page\.onnx: truncated, or not an ONNX file"):
        onnx_metadata(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, bytes(range(156, 256)), b"PK\x03\x04 half an archive"])
def test_torchscript_metadata__damage(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.torchscript"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.torchscript"):
        torchscript_metadata(path)


def test_torchscript_metadata__flipped_byte(tmp_path: Path) -> None:
    """PyTorch loads an archive whose checksums are wrong; here that is an error."""
    path = tmp_path / "x.torchscript"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/0", b"weights" * 100)
        archive.writestr("x/extra/config.txt", '{"stride": 32}')
    assert torchscript_metadata(path) == {"stride": 32}
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="checksum of x/data/0 is wrong"):
        torchscript_metadata(path)


@pytest.mark.parametrize("config", [None, "[1]", "{not json"])
def test_torchscript_metadata__without_a_mapping(config: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.torchscript"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/0", b"weights")
        if config is not None:
            archive.writestr("x/extra/config.txt", config)
    if config is None:
        assert torchscript_metadata(path) == {}
        return
    with pytest.raises(ModelError, match=r"x\.torchscript"):
        torchscript_metadata(path)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\x00"])
def test_yaml_metadata__damage(text: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.yaml").write_text(text)
    with pytest.raises(ModelError, match=r"metadata\.yaml.*export it again"):
        yaml_metadata(tmp_path)


def test_check_file__not_there_and_not_readable(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        check_file(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match=r"its file gone\.bin is missing"):
        check_file(tmp_path / "gone.bin", tmp_path)
    (tmp_path / "empty.bin").touch()
    with pytest.raises(ModelError, match=r"its empty\.bin is empty"):
        check_file(tmp_path / "empty.bin", tmp_path)


def test_folder_file__none_one_several(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no file \*\.xml"):
        folder_file(tmp_path, "*.xml")
    (tmp_path / "a.xml").write_text("<net/>")
    assert folder_file(tmp_path, "*.xml") == folder_file(tmp_path / "a.xml", "*.xml") == tmp_path / "a.xml"
    (tmp_path / "b.xml").write_text("<net/>")
    with pytest.raises(ModelError, match="holds 2 files"):
        folder_file(tmp_path, "*.xml")
