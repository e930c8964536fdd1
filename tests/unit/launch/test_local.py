"""What happens before a rank trains, with a training that only looks at what it gets."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

import moetrain.data
import moetrain.train.run
from moetrain.errors import ConfigError, DataError, TrainingError
from moetrain.launch.local import ReportedError, train
from moetrain.parallel.ranks import Ranks


@pytest.fixture
def trained(monkeypatch):
    """Calls of run_training; data preparation succeeds at once."""
    calls = []

    def run_training(config, ranks, run_dir, *, data, stop):
        calls.append((config, ranks, run_dir, sorted(p.name for p in run_dir.iterdir()), torch.get_num_threads()))
        return {"status": "complete", "step": config.train.steps, "run_dir": str(run_dir)}

    monkeypatch.setattr(moetrain.data, "prepare", lambda data, *, progress: SimpleNamespace(vocab_size=64))
    monkeypatch.setattr(moetrain.train.run, "run_training", run_training)
    threads = torch.get_num_threads()
    yield calls
    torch.set_num_threads(threads)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_rank_trains_in_this_process_in_a_folder_that_says_what_runs(compose, trained, in_tmp):
    result = train(compose("train.threads=1", "run.dir=run", "train.steps=3")[0])
    ((config, ranks, run_dir, files, threads),) = trained
    assert result["step"] == config.train.steps == 3
    assert (ranks, str(run_dir), threads) == (Ranks(), "run", 1)
    assert files == ["config.yaml", "environment.json"]


def test_several_machines_need_torchrun_and_the_message_shows_how(compose, trained, in_tmp):
    with pytest.raises(ConfigError, match="torchrun --nnodes 2 --nproc-per-node 4 .* -m moetrain.launch.train"):
        train(compose("launch.nnodes=2", "launch.nproc_per_node=4")[0])
    assert not trained and list(in_tmp.iterdir()) == []


def test_data_that_cannot_be_prepared_leaves_no_run_folder(compose, trained, in_tmp, monkeypatch):
    def prepare(data, *, progress):
        raise DataError("nothing there")

    monkeypatch.setattr(moetrain.data, "prepare", prepare)
    with pytest.raises(DataError):
        train(compose()[0])
    assert not trained and list(in_tmp.iterdir()) == []


def test_ctrl_c_ends_the_preparation_of_data(compose, trained, in_tmp, monkeypatch):
    def prepare(data, *, progress):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(moetrain.data, "prepare", prepare)
    with pytest.raises(ReportedError, match="stopped before training began") as error:
        train(compose()[0])
    assert error.value.exit_code == 130
    assert list(in_tmp.iterdir()) == []


def test_a_run_that_is_not_this_one_is_refused_before_data_is_prepared(compose, trained, in_tmp, monkeypatch):
    train(compose("run.dir=run")[0])
    monkeypatch.setattr(moetrain.data, "prepare", lambda data, *, progress: pytest.fail("prepared"))
    with pytest.raises(ConfigError, match="train.seed = 1: the run in run has 0"):
        train(compose("run.dir=run", "train.seed=1")[0])
    assert len(trained) == 1


def test_a_signal_reaches_training_through_stop(compose, trained, in_tmp, monkeypatch):
    def run_training(config, ranks, run_dir, *, data, stop):
        assert stop() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        return {"status": "interrupted", "signal": stop()}

    monkeypatch.setattr(moetrain.train.run, "run_training", run_training)
    assert train(compose()[0])["signal"] == signal.SIGUSR1


def test_an_error_of_training_keeps_its_exit_code(compose, trained, in_tmp, monkeypatch):
    def run_training(config, ranks, run_dir, *, data, stop):
        raise TrainingError("diverged")

    monkeypatch.setattr(moetrain.train.run, "run_training", run_training)
    with pytest.raises(TrainingError) as caught:
        train(compose()[0])
    assert caught.value.exit_code == 4
