"""Every shipped recipe trains at toy size, whatever its model."""

import pytest
from runs import TINY, lines, moetrain

from moetrain.launch.compose import shipped


@pytest.mark.parametrize("name", shipped("experiment"))
def test_a_recipe_trains(name, workspace):
    done = moetrain("train", f"experiment={name}", *TINY, "train.steps=2", f"run.dir=experiment-{name}", folder=workspace)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(workspace / f"experiment-{name}")] == [1, 2]
