"""The emulated cluster of scripts/bench: that a benchmark runs on it, and that nothing is left of it however it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def can_make_namespaces():
    if os.geteuid() != 0:
        return "not root"
    missing = [program for program in ("ip", "tc", "nsenter", "unshare", "setpriv") if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: scripts/setup_network.sh"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "ip", "link", "add", "bridge", "type", "bridge"], capture_output=True)
    return f"no namespaces: {tried.stderr.decode().strip()}" if tried.returncode else None


reason = can_make_namespaces()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


class Emulation:
    """Starts emulations whose processes, and all that these start, carry a mark in their environment."""

    def __init__(self):
        self.mark = uuid.uuid4().hex

    def start(self, *arguments):
        command = [sys.executable, str(BENCH / "emulate_cluster.py"), "--ranks-per-node", "1", *arguments]
        environment = {**os.environ, "EMULATION_MARK": self.mark}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments):
        with self.start(*arguments) as process:
            output, error = process.communicate(timeout=120)
        return process.returncode, output, error

    def networks(self):
        """The network namespaces of the processes that carry the mark."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes():
                        found.add((entry / "ns" / "net").readlink())
                except OSError:  # it has ended, or belongs to others
                    continue
        return found


@pytest.fixture
def emulation():
    """After the test, no process of the emulation may be left; a namespace lives no longer than its processes."""
    emulation = Emulation()
    yield emulation
    limit = time.monotonic() + 3  # what the kernel kills takes a moment
    while emulation.networks() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not emulation.networks()


def test_a_benchmark_between_two_nodes(emulation, tmp_path):
    sizes = ["--tokens", "64", "--hidden", "32", "--width", "32", "--experts", "4", "--rounds", "1", "--warmup", "1", "--window", "1"]
    program = [sys.executable, str(BENCH / "placement_step.py"), *sizes, "--out", str(tmp_path / "step.jsonl")]
    status, output, error = emulation.run("--rate", "100mbit", "--", *program)
    assert status == 0, error
    said = re.match(r"emulated cluster: 2 nodes x 1 ranks, links of 100mbit: ([0-9.]+) Mbit/s measured", output)
    assert said and 0 < float(said[1]) < 110, "the limit is an upper bound, but for what the bucket lets through at once"
    setup, *rounds, _ = (json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines())
    assert setup["setup"]["nodes"] == [0, 1]
    assert setup["setup"]["cluster"]["inter_bandwidth"] * 8 / 1e6 == pytest.approx(float(said[1]), abs=0.05), (
        "planners get the measured rate"
    )
    assert [record["system"] for record in rounds] == setup["setup"]["systems"]
    for record in rounds:
        assert all(kind.endswith(".inter") for kinds in record["bytes"] for kind in kinds), "each node has one rank"
        assert sum(sum(kinds.values()) for kinds in record["bytes"]) > 0
    report = (tmp_path / "step.md").read_text()
    assert report.startswith("Emulation.") and report.strip() in output


def test_a_failing_rank_ends_the_others_and_gives_its_status(emulation):
    script = 'if [ "$RANK" = 1 ]; then echo the reason; exit 7; fi; sleep 100 & wait'
    started = time.monotonic()
    status, _, error = emulation.run("--no-calibration", "--", "sh", "-c", script)
    assert status == 7
    assert "rank 1 ended with exit status 7" in error and "the reason" in error
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_everything(emulation, number):
    with emulation.start(
        "--no-calibration", "--", sys.executable, "-c", "print('up', flush=True); import time; time.sleep(100)"
    ) as process:
        assert "2 nodes" in process.stdout.readline()
        assert process.stdout.readline() == "up\n"
        assert len(emulation.networks()) == 4, "ours, the switch's and those of two nodes"
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else -signal.SIGKILL)


def test_time_is_limited(emulation):
    status, _, error = emulation.run("--no-calibration", "--timeout", "1", "--", "sleep", "100")
    assert status == 124 and "did not finish within 1 s" in error
