"""Permutations: the best one for a matrix of scores, and its smooth relative."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def best_permutation(scores: Tensor) -> Tensor:
    """The column of each row in the permutation that maximises the sum of scores [n, n]: [n] int64 on the same device.

    The Hungarian method by shortest augmenting paths, O(n^3), on CPU in float64; the result is a pure function of the scores.
    """
    cost = -scores.detach().double().cpu().numpy()
    size = cost.shape[0]
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=np.int64)  # by column; rows and columns count from 1, 0 is none
    for row in range(1, size + 1):
        row_of[0], column = row, 0
        distance, previous = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.int64)
        reached = np.zeros(size + 1, dtype=bool)
        while row_of[column]:
            reached[column] = True
            here = row_of[column]
            reduced = np.concatenate([[np.inf], cost[here - 1] - row_price[here] - column_price[1:]])
            shorter = ~reached & (reduced < distance)
            distance[shorter], previous[shorter] = reduced[shorter], column
            nearest = int(np.where(reached, np.inf, distance).argmin())
            delta = distance[nearest]
            row_price[row_of[reached]] += delta
            column_price[reached] -= delta
            distance[~reached] -= delta
            column = nearest
        while column:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    return torch.from_numpy(row_of[1:].argsort()).to(scores.device)


def sinkhorn(log_scores: Tensor, iterations: int) -> Tensor:
    """Matrices [..., n, n] whose columns sum to one and whose rows nearly do: rows, then columns of exp(log_scores) are
    normalised in turn, in log space."""
    for _ in range(iterations):
        log_scores = log_scores - torch.logsumexp(log_scores, dim=-1, keepdim=True)
        log_scores = log_scores - torch.logsumexp(log_scores, dim=-2, keepdim=True)
    return log_scores.exp()
