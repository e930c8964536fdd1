"""Kernels compile for every target without spills, with matrix instructions, within shared memory; no GPU is needed."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts" / "bench"))
    import compile_kernels

    return compile_kernels


def test_a_pairwise_choice_of_builds_has_no_faults(bench):
    every = list(bench.builds())
    chosen = bench.pairwise(every)
    assert {(b.target, b.kernel) for b in chosen} == {(b.target, b.kernel) for b in every}
    rows = [bench.measure(build) for build in chosen]
    assert not [(row["target"], build.name, row["faults"]) for row, build in zip(rows, chosen, strict=True) if row["faults"]]
    boxed = {row["target"] for row in rows if row["bulk_copies"]}
    assert boxed == {"sm_90", "sm_100"}, "tensor descriptors are not compiled to bulk copies, or where there are none"


def test_faults_are_found(bench):
    """A tile that is too large for the registers, one for the shared memory, and products without matrix instructions."""
    build = next(b for b in bench.builds() if (b.target, b.kernel) == ("sm_90", "activation"))
    spilling = bench.measure(replace(build, tile=replace(build.tile, columns=256, depth=32, stages=2)))
    assert spilling["spilled_bytes"] and "spilled" in spilling["faults"][0]
    crowded = bench.measure(replace(build, tile=replace(build.tile, stages=5)))
    assert any("shared memory" in fault for fault in crowded["faults"])
    assert bench.faults({**crowded, "spilled_bytes": 0, "shared_bytes": 0, "matrix_instructions": 0}, build) == ["no matrix instructions"]
