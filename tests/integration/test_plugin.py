"""A router from outside the package, installed as its users would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TINY, lines, moetrain

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_router"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """PYTHONPATH with the example on it, installed without network."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, folder / "source")  # pip builds in place
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))


def test_a_router_is_a_file_an_entry_point_and_a_test(path, workspace):
    listed = moetrain("list", "routers", folder=workspace, PYTHONPATH=path)
    assert "my_router" in listed.stdout and "examples/my_router" in listed.stdout, listed.stderr
    overrides = ["router=my_router", "router.ratio=0.9", "train.steps=2", "run.dir=my_router"]
    trained = moetrain("train", *TINY, *overrides, folder=workspace, PYTHONPATH=path)
    assert trained.returncode == 0, trained.stderr
    assert [line["step"] for line in lines(workspace / "my_router")] == [1, 2]
    refused = moetrain("train", *TINY, *overrides, "router.ratio=2", folder=workspace, PYTHONPATH=path)
    assert refused.returncode == 2 and "router.ratio = 2.0: must be > 0 and <= 1" in refused.stderr
    tested = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE)]
    done = subprocess.run(tested, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_without_it_the_name_is_unknown(workspace):
    refused = moetrain("train", *TINY, "router=my_router", folder=workspace)
    assert refused.returncode == 2 and "my_router" in refused.stderr
