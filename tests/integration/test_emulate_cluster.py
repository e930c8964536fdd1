"""The emulated cluster of scripts/bench: what ranks see, and that nothing is left of it however it ends."""

import json
import os
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


def test_ranks_find_each_other_across_the_limited_link(emulation):
    program = str(BENCH / "link_bandwidth.py")
    status, output, error = emulation.run("--rate", "100mbit", "--", sys.executable, program, "--bytes", "2000000")
    assert status == 0, error
    first, second = output.splitlines()
    assert "2 nodes x 1 ranks" in first and "measured" in first
    # the limit is an upper bound; the bucket lets 1 % of a second through at once
    assert 1e6 < json.loads(second)["bytes_per_second"] < 100e6 / 8 * 1.1


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
