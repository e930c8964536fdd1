"""Fault points: armed by rank, step and name only."""

from __future__ import annotations

import multiprocessing
import signal

import pytest

from moetrain.train import faults


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_FAULT", raising=False)
    faults.point("ckpt.begin", 1)


@pytest.mark.parametrize(
    ("armed", "fires"),
    [("a:0:3:raise", True), ("a:0:*:raise", True), ("a:1:3:raise", False), ("a:0:4:raise", False), ("b:0:3:raise", False)],
)
def test_name_rank_and_step_must_match(monkeypatch: pytest.MonkeyPatch, armed: str, fires: bool) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MOETRAIN_FAULT", armed)
    if fires:
        with pytest.raises(faults.FaultError, match="a at step 3 on rank 0"):
            faults.point("a", 3)
    else:
        faults.point("a", 3)


def test_the_rank_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MOETRAIN_FAULT", "a:2:*:raise")
    with pytest.raises(faults.FaultError):
        faults.point("a")


@pytest.mark.parametrize("armed", ["a:0:3", "a:0:3:explode", "a"])
def test_a_malformed_variable_is_named(monkeypatch: pytest.MonkeyPatch, armed: str) -> None:
    monkeypatch.setenv("MOETRAIN_FAULT", armed)
    with pytest.raises(ValueError, match="MOETRAIN_FAULT=.*point:rank:step:action"):
        faults.point("a", 3)


@pytest.mark.parametrize(("action", "status"), [("kill", -signal.SIGKILL), ("exit", 1)])
def test_actions_that_end_the_process(monkeypatch: pytest.MonkeyPatch, action: str, status: int) -> None:
    monkeypatch.setenv("MOETRAIN_FAULT", f"a:0:*:{action}")
    process = multiprocessing.get_context("fork").Process(target=faults.point, args=("a",))
    process.start()
    process.join(10)
    assert process.exitcode == status
