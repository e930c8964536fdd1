"""The wheel holds code and configurations, and its console script works from an empty directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_symlinked_packages_and_yaml(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in ("cli.py", "configs/config.yaml", "configs/model/glam_tiny.yaml", "launch/local.py", "kernels/triton_ops/expert_ffn.py"):
        assert f"moetrain/{path}" in names
    assert "moetrain/kernels/__init__.py" not in names  # it would shadow another package called kernels
    assert not any(name.startswith("tests/") for name in names)


def test_the_console_script_runs_from_an_empty_directory(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, str(site / "bin" / "moetrain"), "train", "model=glam_tiny", "--cfg", "job"]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kind: glam" in done.stdout
    assert list(empty.iterdir()) == []
