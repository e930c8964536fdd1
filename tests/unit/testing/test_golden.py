"""The golden loader: what it returns, and that nothing is skipped silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetrain.testing import golden
from moetrain.testing.golden import DEFAULT_FOLDER, golden_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_file({"x": torch.arange(3.0, dtype=torch.float64)}, tmp_path / "toy.safetensors")
    (tmp_path / "toy.json").write_text(json.dumps({"slug": "toy", "tensors": {"x": {"shape": [3]}}}))
    monkeypatch.setenv("MOETRAIN_GOLDEN", str(tmp_path))
    return tmp_path


def test_description_and_tensors(folder: Path) -> None:
    meta, tensors = golden("toy")
    assert meta["slug"] == "toy"
    assert torch.equal(tensors["x"], torch.arange(3.0, dtype=torch.float64))


@pytest.mark.parametrize("missing", ["toy.json", "toy.safetensors"])
def test_a_missing_file_is_an_error(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"'toy': .*{missing} does not exist .*MOETRAIN_GOLDEN"):
        golden("toy")


def test_files_that_disagree_are_an_error(folder: Path) -> None:
    (folder / "toy.json").write_text(json.dumps({"tensors": {"x": {}, "y": {}}}))
    with pytest.raises(ValueError, match=r"disagree on the tensors \['y'\]"):
        golden("toy")


def test_the_default_folder_is_in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_GOLDEN", raising=False)
    assert golden_folder() == DEFAULT_FOLDER == Path(__file__).parents[2] / "golden" / "data"
