#!/usr/bin/env python3
"""Runs a command as the ranks of a small cluster that is emulated on this machine. Needs root, iproute2 and util-linux.

usage: scripts/bench/emulate_cluster.py --nodes 2 --ranks-per-node 2 --rate 200mbit -- python scripts/bench/placement_step.py

Every node is a network namespace with a host name of its own; a switch in one more namespace joins them through links
of limited rate (token buckets, in both directions). Files and processors are shared, ranks of one node talk over an
unlimited loopback. Every rank gets torchrun's variables, one thread, and the measured bandwidth between two nodes in
EMULATED_BYTES_PER_SECOND.

The namespaces have no names: they live as long as a process is in them, so runs cannot collide, and nothing in the
machine's own network changes. All their processes are killed at the end, also on a failure, time-out or signal; should
this program itself be killed, the kernel kills the ranks, though not what these have started. The exit status is that
of the first rank that failed, 124 after a time-out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "setpriv": "util-linux"}
SUBNET = "10.77.0"
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]
GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL."""


class ClusterError(Exception):
    """The cluster cannot be set up, or something is left of it."""


def check_requirements() -> None:
    """Raises ClusterError if this process or machine lacks what is needed."""
    if os.geteuid() != 0:
        raise ClusterError("needs root: network namespaces and links are made")
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        raise ClusterError(f"needs {' and '.join(missing)}: run scripts/setup_network.sh")


def bytes_per_second(rate: str) -> float:
    """Of a rate in tc's notation: 200mbit -> 25e6. Raises argparse.ArgumentTypeError for another notation."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{rate!r} is not a rate like 500kbit, 200mbit or 1gbit")
    return float(match[1]) * UNITS[match[2]] / 8


def command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")


class Namespace:
    """Network, mount and host-name namespaces that a sleeping process keeps alive."""

    def __init__(self, name: str, hosts: Path) -> None:
        self.name = name
        # nsenter by process id must not come before the namespaces are there: the pipe says when
        setup = f"mount --bind {hosts} /etc/hosts && hostname {name} && ip link set lo up && echo ready && exec sleep infinity"
        self.holder = subprocess.Popen(
            [*DIE_WITH_PARENT, "unshare", "--net", "--mount", "--uts", "sh", "-c", setup],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        assert self.holder.stdout is not None and self.holder.stderr is not None
        if self.holder.stdout.readline() != "ready\n":
            raise ClusterError(f"cannot make the namespaces of {self.name}: {self.holder.stderr.read().strip()}")
        self.inode = network_of(self.holder.pid)

    def command(self, *words: str) -> None:
        command("nsenter", "--target", str(self.holder.pid), "--net", *words)

    def start(self, words: Sequence[str], variables: dict[str, str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
        """A process on this node, in the folder and with the files of this process. output: None inherits ours."""
        enter = ["nsenter", "--target", str(self.holder.pid), "--net", "--mount", "--uts", "--wd=."]
        environment = {**os.environ, **variables}
        return subprocess.Popen(
            [*DIE_WITH_PARENT, *enter, *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def network_of(pid: int) -> int | None:
    """The network namespace of a process; None if it is gone, or shielded from us and so not ours."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def processes_in(networks: set[int]) -> list[int]:
    """All processes of these network namespaces, whoever started them."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in pids if network_of(pid) in networks]


@contextmanager
def cluster(nodes: int, rate: str) -> Iterator[list[Namespace]]:
    """Joined nodes node0 (10.77.0.1), node1 (10.77.0.2), ... for the time of the block.

    Raises ClusterError if they cannot be made, or if processes are left in them at the end that cannot be killed.
    """
    members: list[Namespace] = []
    try:
        with tempfile.NamedTemporaryFile("w", prefix="hosts-") as hosts:
            # in both forms of the address: torch's store asks for the name of the second
            names = [f"{prefix}{SUBNET}.{i + 1} node{i}\n" for i in range(nodes) for prefix in ("", "::ffff:")]
            hosts.write("127.0.0.1 localhost\n" + "".join(names))
            hosts.flush()
            for name in ("switch", *(f"node{i}" for i in range(nodes))):
                members.append(Namespace(name, Path(hosts.name)))
            for member in members:
                member.wait_until_ready()
        join(members[0], members[1:], rate)
        yield members[1:]
    finally:
        end(members)


def join(switch: Namespace, nodes: list[Namespace], rate: str) -> None:
    """Links from all nodes to the switch, limited at both ends: what a node sends, and what it receives."""
    burst = max(16 * 1024, int(bytes_per_second(rate) * 0.01))
    limit = f"qdisc add dev {{}} root tbf rate {rate} burst {burst} latency 50ms"
    switch.command("ip", "link", "add", "bridge", "type", "bridge")
    switch.command("ip", "link", "set", "bridge", "up")
    for i, node in enumerate(nodes):
        port = f"port{i}"
        ends = ("eth0", "netns", str(node.holder.pid), "type", "veth", "peer", "name", port, "netns", str(switch.holder.pid))
        command("ip", "link", "add", *ends)
        node.command("ip", "address", "add", f"{SUBNET}.{i + 1}/24", "dev", "eth0")
        switch.command("ip", "link", "set", port, "master", "bridge")
        for namespace, device in ((node, "eth0"), (switch, port)):
            namespace.command("ip", "link", "set", device, "up")
            namespace.command("tc", *limit.format(device).split())


def end(members: list[Namespace]) -> None:
    """Kill all processes of the namespaces, with which these and their links disappear; checks that none is left."""
    networks = {member.inode for member in members if hasattr(member, "inode")} - {network_of(os.getpid()), None}
    for member in members:
        member.holder.kill()
    limit = time.monotonic() + 5
    while left := [pid for pid in processes_in(networks) if not is_zombie(pid)]:
        if time.monotonic() > limit:
            raise ClusterError(f"processes {left} of the emulated cluster cannot be killed")
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has ended by itself
                continue
        time.sleep(0.02)
    for member in members:
        member.holder.wait()


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def run_ranks(nodes: list[Namespace], ranks_per_node: int, words: Sequence[str], variables: dict[str, str], *,
              timeout: float, show: bool = True) -> tuple[int, str]:  # fmt: skip
    """The command as all ranks. Returns the exit status and, unless it is shown as it comes, rank 0's output.

    Stops at the first rank that fails, with the end of its output on standard error.
    """
    with ExitStack() as stack:
        outputs: list[IO[bytes] | None] = []
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(terminate, ranks)
        for rank in range(len(nodes) * ranks_per_node):
            output = None if show and rank == 0 else stack.enter_context(tempfile.TemporaryFile())
            outputs.append(output)
            ours = rank_variables(rank, len(nodes), ranks_per_node)
            ranks.append(nodes[rank // ranks_per_node].start(words, {**ours, **variables}, output))
        status, rank = wait(ranks, timeout)
        if status and outputs[rank] is not None:
            text = read(outputs[rank])
            print(f"rank {rank} ended with exit status {status}:\n" + "\n".join(text.splitlines()[-30:]), file=sys.stderr)
        return status, read(outputs[0])


def rank_variables(rank: int, nodes: int, ranks_per_node: int) -> dict[str, str]:
    """The environment that torchrun would give to a rank, and gloo's interface."""
    node, local_rank = divmod(rank, ranks_per_node)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(nodes * ranks_per_node),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": f"{SUBNET}.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
    }


def wait(ranks: list[subprocess.Popen[bytes]], timeout: float) -> tuple[int, int]:
    """(exit status, rank) of the first that fails; (0, 0) if all succeed; (124, 0) after ``timeout`` seconds."""
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        statuses = [process.poll() for process in ranks]
        for rank, status in enumerate(statuses):
            if status:
                return (status if status > 0 else 128 - status), rank
        if None not in statuses:
            return 0, 0
        time.sleep(0.05)
    print(f"the ranks did not finish within {timeout:g} s", file=sys.stderr)
    return 124, 0


def terminate(ranks: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM first; whatever survives it is killed with the namespaces."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    limit = time.monotonic() + GRACE
    for process in ranks:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read(output: IO[bytes] | None) -> str:
    if output is None:
        return ""
    output.seek(0)
    return output.read().decode(errors="replace")


def measure_link(nodes: list[Namespace], rate: str) -> float:
    """Bytes per second that a gloo rank of the first node sends to one of the second."""
    size = max(64 * 1024, int(bytes_per_second(rate) * 0.3))  # 0.3 s: many times the bucket
    program = [sys.executable, str(Path(__file__).with_name("link_bandwidth.py")), "--bytes", str(size)]
    status, output = run_ranks(nodes[:2], 1, program, {}, timeout=120, show=False)
    if status:
        raise ClusterError(f"the calibration transfer failed:\n{output}")
    return json.loads(output.splitlines()[-1])["bytes_per_second"]


def stop(number: int, frame: FrameType | None) -> NoReturn:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second Ctrl-C must not interrupt the cleaning up
        signal.signal(ignored, signal.SIG_IGN)
    sys.exit(128 + number)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--rate", default="200mbit", help="of each node's link, in each direction (default: 200mbit)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the command (default: 600)")
    parser.add_argument("--no-calibration", action="store_true", help="tell the ranks the rate that was asked for, not a measured one")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what every rank runs")
    options = parser.parse_args(arguments)
    try:
        bytes_per_second(options.rate)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--rate: {error}")
    if not 2 <= options.nodes <= 200 or options.ranks_per_node < 1:
        parser.error("--nodes must be 2 to 200 and --ranks-per-node at least 1")
    return options


def main(arguments: Sequence[str]) -> int:
    """Set up, measure, run, remove; the exit status."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        check_requirements()
        with cluster(options.nodes, options.rate) as nodes:
            bandwidth = bytes_per_second(options.rate)
            said = f"emulated cluster: {options.nodes} nodes x {options.ranks_per_node} ranks, links of {options.rate}"
            if options.no_calibration:
                print(f"{said}, not measured", flush=True)
            else:
                measured = measure_link(nodes, options.rate)
                print(f"{said}: {measured * 8 / 1e6:.1f} Mbit/s measured ({measured / bandwidth:.0%})", flush=True)
                bandwidth = measured
            variables = {"EMULATED_BYTES_PER_SECOND": repr(bandwidth)}
            return run_ranks(nodes, options.ranks_per_node, options.command, variables, timeout=options.timeout)[0]
    except ClusterError as error:
        print(f"emulate_cluster: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
