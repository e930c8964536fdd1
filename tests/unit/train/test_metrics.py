"""metrics.jsonl, sinks and displays."""

import json
from pathlib import Path

import pytest

from moetrain.errors import StorageError
from moetrain.train.display import duration, plain_line, sparkline
from moetrain.train.metrics import MetricsFile, Phases, Recorder, flatten


def test_lost_and_cut_lines_are_removed_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 6)) + '{"step": 6, "lo')
    file = MetricsFile(path, resumed_step=3)
    file.write({"step": 4, "loss": 0.1 + 0.2})
    file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] == 0.1 + 0.2


def test_numbers_that_json_lacks_become_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    file.write({"step": 1, "loss": float("nan"), "experts": {"a": {"entropy": float("inf"), "load": [1, 2]}}})
    file.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line == {"step": 1, "loss": None, "experts": {"a": {"entropy": None, "load": [1, 2]}}}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_is_a_storage_error_also_when_the_file_is_closed(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    file.file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(StorageError, match="No space left"):
        file.write({"step": 1})
    file.close()


class Broken:
    def __init__(self):
        self.calls = 0

    def write(self, step, values):
        self.calls += 1
        raise ConnectionError("service is down")

    def close(self):
        raise AssertionError("a dropped sink is not called again")


def test_a_sink_that_fails_is_dropped_and_training_goes_on(tmp_path, caplog):
    sink = Broken()
    recorder = Recorder(MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0), [sink])
    recorder.write({"step": 1})
    recorder.write({"step": 2})
    recorder.close()
    assert sink.calls == 1 and "service is down" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_flatten_keeps_numbers():
    assert flatten({"step": 1, "a": {"b": 2.0, "load": [1, 2]}, "t": "x"}) == {"step": 1, "a/b": 2.0}


def test_phases_add_up():
    phases = Phases()
    with phases("a"):
        pass
    first = phases.seconds["a"]
    with phases("a"):
        pass
    assert phases.seconds["a"] > first >= 0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3661, "1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_sparkline_and_plain_line():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, float("nan"), 7, float("inf")]) == "▁█" and sparkline([float("nan")]) == ""
    assert len(sparkline(list(range(1000)), 48)) <= 48 and sparkline([]) == ""
    line = {"step": 2, "loss": 1.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 10.0, "experts": {}, "skipped": True}
    text = plain_line(line, 10, 5.0)
    assert "step 2/10" in text and "loss 1.5000" in text and "SKIPPED" in text
