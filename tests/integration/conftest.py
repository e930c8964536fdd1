import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runs import TINY, losses, moetrain, write_text


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with the toy text, its cache, and an uninterrupted reference run in ``reference``."""
    folder = tmp_path_factory.mktemp("workspace")
    write_text(folder)
    done = moetrain("train", *TINY, "run.dir=reference", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def reference(workspace):
    return losses(workspace / "reference")
