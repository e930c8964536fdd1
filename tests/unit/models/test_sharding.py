"""Which parameters tensor parallelism splits, and how."""

from fnmatch import fnmatchcase

import pytest
import torch

from moetrain.models.common.sharding import SPLITS, find_split
from moetrain.testing.scenarios import SCENARIOS


def names(scenario):
    with torch.device("meta"):
        model = scenario.model.build(scenario.parts, vocab_size=scenario.vocab_size, dtype=scenario.dtype)
    return {name: parameter.ndim for name, parameter in model.named_parameters()}


FAMILIES = {name: names(SCENARIOS[name]) for name in ("deepseek", "glam_capacity", "zero_experts", "recurrent")}


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    found = {name: find_split(SPLITS, name) for family in FAMILIES.values() for name in family}
    assert all(any(fnmatchcase(name, pattern) for name in found) for pattern in SPLITS)
    assert {name for name, split in found.items() if split == "row"} == {n for n in found if n.endswith(("w_o.weight", "w_down.weight"))}
    assert {n.rpartition(".")[2] for n, split in found.items() if split == "experts"} == {"w_in", "w_out"}
    assert (found["embed"], found["head.weight"], found["layers.0.attn.bias.weight"]) == ("vocabulary", "vocabulary", "heads")
    assert (found["layers.1.ffn.shared.w_up.weight"], found["layers.0.ffn.w_gate.weight"]) == ("column", "column")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_vectors_routers_and_zero_computation_experts_stay_whole(family):
    whole = {name for name in FAMILIES[family] if find_split(SPLITS, name) == "whole"}
    assert whole == {name for name, ndim in FAMILIES[family].items() if ndim == 1 or ".router." in name or ".zero_experts." in name}


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="layers.0.new.weight"):
        find_split(SPLITS, "layers.0.new.weight")
