"""Memory that a process frees and takes again."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from moetrain.launch.local import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    return [torch.ones(16 << 20) for _ in range(4)] and None
for _ in range(8):  # the heap grows once more in one of the first steps, when a small allocation has split a free block
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_not_cleared_again():
    run = lambda mode: int(subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True).stdout)  # noqa: E731
    assert run("keep") < 100 < 1000 < run("return")
