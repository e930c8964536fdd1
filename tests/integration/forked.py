"""A process that has imported what commands need, and forks for each command that it reads: imports take most of a toy run."""

import json
import os
import sys
import threading


def next_command():
    """In the process that is forked for it; None at the end of the input. The answer is its exit code, negative for a signal."""
    for line in sys.stdin:
        if not os.fork():
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    return None


def run(arguments, folder, environment, stdout, stderr):
    """The command's exit code."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(path, os.O_RDWR), descriptor)
    from moetrain.cli import main

    return main(arguments)


if __name__ == "__main__":
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the command line does, before torch is imported
    import hydra  # noqa: F401
    import torch._dynamo  # noqa: F401

    import moetrain.components
    import moetrain.inference.generate
    import moetrain.launch.compose
    import moetrain.launch.local
    import moetrain.train.run  # noqa: F401

    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a fork has only the thread that made it"
    command = next_command()
    sys.exit(0 if command is None else run(**command))
