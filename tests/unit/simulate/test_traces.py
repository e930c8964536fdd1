"""Traces: cut for other numbers of ranks, scaled, read, drawn."""

import gzip
import json

import numpy as np
import pytest

from moetrain.errors import ConfigError
from moetrain.simulate.traces import Trace, divide, read_trace, scale, synthetic_trace


@pytest.fixture
def counts():
    """[S, L, R, E] with some zeros."""
    return np.random.default_rng(0).integers(0, 30, size=(4, 2, 3, 5)) * np.array([1, 1, 0, 1, 1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 7, 32])
def test_another_number_of_ranks_loses_no_row(counts, ranks):
    cut = divide(counts, ranks)
    assert cut.shape == (4, 2, ranks, 5) and cut.min() >= 0 and cut.dtype == np.int64
    assert np.array_equal(cut.sum(axis=2), counts.sum(axis=2))


def test_ranks_that_differed_go_on_to_differ(counts):
    assert np.array_equal(divide(counts, 3), counts)
    fine = divide(counts, 12)
    assert np.array_equal(fine.reshape(4, 2, 3, 4, 5).sum(axis=3), counts)
    quarter = counts[:, :, :, None] / 4
    assert np.abs(fine.reshape(4, 2, 3, 4, 5) - quarter).max() < 1
    assert np.array_equal(divide(counts, 1)[:, :, 0], counts.sum(axis=2))


def test_remainders_do_not_gather_on_one_rank():
    """One row of each of 64 experts over 8 ranks: cut alike, the last rank would get all of them."""
    assert divide(np.ones((1, 64), dtype=np.int64), 8).sum(axis=-1).tolist() == [8] * 8


def test_scaled_counts_keep_proportions(counts):
    for rows in (7, 64, 100_000):
        scaled = scale(counts, rows)
        assert np.array_equal(scaled.sum(axis=-1), np.where(counts.sum(axis=-1) > 0, rows, 0))
        share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
        assert np.abs(scaled - rows * share).max() < 1


@pytest.mark.parametrize("name", ["loads.jsonl", "loads.jsonl.gz"])
def test_a_trace_is_read_as_it_was_written(counts, tmp_path, name):
    lines = [
        json.dumps({"step": i + 1, "loads": {f"layers.{j}.ffn": part.tolist() for j, part in enumerate(step)}})
        for i, step in enumerate(counts)
    ]
    path = tmp_path / name
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    trace = read_trace(path)
    assert trace.layers == ("layers.0.ffn", "layers.1.ffn") and np.array_equal(trace.counts, counts)
    assert (trace.num_steps, trace.num_ranks, trace.num_experts) == (4, 3, 5)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no steps"),
        ("not json", "line 1 is not"),
        ('{"step": 1}', "line 1 is not"),
        ('{"step": 1, "loads": {"a": [1, 2]}}', "line 1 is not"),
        ('{"step": 1, "loads": {"a": [[1.5]]}}', "line 1 is not"),
        ('{"step": 1, "loads": {"a": [[-1]]}}', "line 1 is not"),
        ('{"step": 1, "loads": {"a": [[1, 2]], "b": [[1]]}}', "line 1 is not"),
        ('{"step": 1, "loads": {"a": [[1]]}}\n{"step": 2, "loads": {"a": [[1, 2]]}}', "line 2 has other"),
        ('{"step": 1, "loads": {"a": [[1]]}}\n{"step": 2, "loads": {"b": [[1]]}}', "line 2 has other"),
    ],
)
def test_a_damaged_trace_is_refused_by_line(content, expected, tmp_path):
    path = tmp_path / "loads.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        read_trace(path)


def test_unreadable_traces_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_trace(tmp_path / "missing.jsonl")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:-10])
    for path in (tmp_path, tmp_path / "cut.gz"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(path)


def draw(name, top_k=2):
    return synthetic_trace(name, steps=5, layers=2, ranks=4, experts=16, tokens=5000, top_k=top_k)


@pytest.mark.parametrize("name", ["uniform", "one", "zipf:1.2", "zipf:0"])
def test_synthetic_traces(name):
    trace = draw(name)
    assert isinstance(trace, Trace) and trace.counts.shape == (5, 2, 4, 16)
    assert (trace.counts.sum(axis=-1) == 10_000).all()
    # sampling: six standard deviations of a share of 1/2 at most
    assert trace.counts.max() <= 5000 + 6 * 50
    assert np.array_equal(trace.counts, draw(name).counts)


def test_popularities():
    loads = draw("zipf:1.2", top_k=1).counts.sum(axis=(0, 2))  # [L, E]
    shares = np.sort(loads, axis=-1)[:, ::-1] / loads.sum(axis=-1, keepdims=True)
    weights = np.arange(1, 17) ** -1.2
    assert np.abs(shares - weights / weights.sum()).max() < 0.01
    assert not np.array_equal(loads.argsort(), loads.argsort()[::-1])
    assert ((draw("one").counts > 0).sum(axis=-1) == 2).all()
    assert np.ptp(draw("uniform").counts) < 6 * 2 * 25


@pytest.mark.parametrize("name", ["zipf:", "zipf:x", "zipf:-1", "zipf:inf", "zipf:nan"])
def test_zipf_needs_an_exponent(name):
    with pytest.raises(ConfigError, match="exponent"):
        draw(name)


def test_other_names_are_not_synthetic():
    assert draw("runs/x/traces/loads.jsonl") is None
