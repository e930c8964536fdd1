"""Errors that a user can cause, and the exit code that the command line gives for each.

Everything else that goes wrong is a bug or a failure of the machine, and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class MoetrainError(Exception):
    """Base of the errors whose message is meant for the user; ``exit_code`` is the process's exit status."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    field: dotted name as it would be overridden on the command line.
    value: what was given.
    expected: what would be valid, as the end of the sentence "... must be".
    """

    field: str
    value: object
    expected: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.expected}"


class ConfigError(MoetrainError):
    """A configuration that cannot run. Lists every problem, not only the first."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [] if isinstance(problems, str) else list(problems)
        if isinstance(problems, str):
            super().__init__(problems)
        elif len(self.problems) == 1:
            super().__init__(str(self.problems[0]))
        else:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems in the configuration:\n{lines}")


class DataError(MoetrainError):
    """Training data that is missing, empty or unreadable; names the file."""

    exit_code = 2


class CheckpointError(MoetrainError):
    """A checkpoint that is not one, is damaged, or belongs to another model; names the folder and the tensor."""

    exit_code = 2


class StorageError(MoetrainError):
    """The disk refused a write (full, read-only, over quota). The last complete checkpoint is intact."""

    exit_code = 3


class TrainingError(MoetrainError):
    """Training cannot go on, e.g. too many steps in a row had non-finite gradients."""

    exit_code = 4


class CommunicationError(MoetrainError):
    """Another rank is lost or does not answer in time; names the rank that noticed and the operation."""

    exit_code = 5
