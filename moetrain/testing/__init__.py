"""Helpers for tests, shipped so that plug-ins can use them too: ranks, tolerances, golden vectors."""

from moetrain.testing.distributed import RankError, run_distributed
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import TOLERANCES, assert_close

__all__ = ["TOLERANCES", "RankError", "assert_close", "golden", "run_distributed"]
