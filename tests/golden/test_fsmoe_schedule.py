"""Replays the vectors ``fsmoe-schedule``: makespans, the paper's case formulas, best degrees and idle windows."""

import numpy as np
import torch

from moetrain.parallel.placement.schedule import ChunkCosts, best_degree, case_times, idle_window, makespan
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

META, DATA = golden("fsmoe-schedule")
COSTS = ChunkCosts(*(DATA[name].numpy() for name in ("alpha", "beta", "n")))
BY_DEGREE = ChunkCosts(*(DATA[name].numpy()[:, None] for name in ("alpha", "beta", "n")))
"""The same with an axis for the degrees."""
GAR = DATA["t_gar"].numpy()
DEGREES = np.arange(1, DATA["makespan"].shape[1] + 1)


def close(ours, name):
    assert_close(torch.from_numpy(ours), DATA[name], kind="golden")


def test_makespan():
    close(makespan(BY_DEGREE, DEGREES, GAR[:, None]), "makespan")


def test_case_formulas():
    close(case_times(BY_DEGREE, DEGREES, GAR[:, None]), "terms")


def test_best_degree():
    assert best_degree(COSTS, len(DEGREES), GAR).tolist() == DATA["best_r"].tolist()


def test_idle_window():
    close(idle_window(BY_DEGREE, DEGREES), "t_olp")


def test_every_tensor_is_replayed():
    assert set(DATA) == {"alpha", "beta", "n", "t_gar", "makespan", "terms", "best_r", "t_olp"}
