import numpy as np
import pytest

from moetrain.parallel.placement.plan import Cluster, PlacementPlan

CLUSTERS = {
    "one rank": Cluster.even(1, 1),
    "one node": Cluster.even(1, 6),
    "two nodes": Cluster.even(2, 4),
    "a rank per node": Cluster.even(4, 1),
    "uneven nodes, ranks interleaved": Cluster((1, 0, 1, 2, 0, 1, 1)),
}


@pytest.fixture(params=CLUSTERS.values(), ids=CLUSTERS)
def cluster(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def random_plan(rng):
    """Random owners and copies, each possible copy with the given probability."""

    def make(num_experts, cluster, probability):
        owner = rng.integers(cluster.num_ranks, size=num_experts)
        holders = (owner[:, None] == np.arange(cluster.num_ranks)) | (rng.random((num_experts, cluster.num_ranks)) < probability)
        return PlacementPlan(owner, holders)

    return make


@pytest.fixture
def skewed_counts(rng):
    """[R, E] tokens, log-normal over experts; some ranks have no tokens, some experts none."""

    def make(ranks, num_experts, tokens=300):
        weights = rng.lognormal(sigma=1.3, size=num_experts) * (rng.random(num_experts) > 0.1) + 1e-12
        per_rank = tokens * (rng.random(ranks) > 0.1)
        return np.stack([rng.multinomial(n, weights / weights.sum()) for n in per_rank]).astype(np.int64)

    return make
