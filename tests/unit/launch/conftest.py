import pytest

from moetrain.launch.compose import build_config, run_application


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    """These tests are one process, whatever starts them; what Hydra sets in the environment ends with the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


@pytest.fixture
def compose():
    """The plain configurations that a command line gives, one for each job of a sweep."""

    def compose(*overrides):
        jobs = []
        run_application(list(overrides), jobs.append)
        return jobs

    return compose


@pytest.fixture
def configure(compose):
    """The typed configuration that a command line gives."""
    return lambda *overrides: build_config(compose(*overrides)[0])
