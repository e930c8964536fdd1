"""How tensor parallelism may split the parameters of the shared blocks, as plain data.

A matrix is [out, in]. ``column`` splits its outputs and ``row`` its inputs (Megatron-LM, 1909.08053); ``heads`` is
``column`` where a part must be whole attention heads, ``vocabulary`` where the outputs are the vocabulary.
``moetrain.parallel`` applies the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor

Split = Literal["column", "row", "heads", "vocabulary", "whole", "experts"]
"""whole: every rank of a tensor group has all of it. experts: placed by expert."""

SPLITS: Mapping[str, Split] = {
    "embed": "vocabulary",
    "head.weight": "vocabulary",
    "*.attn.w_[qkv].weight": "heads",
    "*.attn.bias.weight": "heads",
    "*.attn.w_o.weight": "row",
    "*.experts.*": "experts",
    "*.ffn.*w_gate.weight": "column",
    "*.ffn.*w_up.weight": "column",
    "*.ffn.*w_down.weight": "row",
    "*.router.*": "whole",
    "*.zero_experts.*": "whole",
    "*norm.*": "whole",
}
"""By parameter name; the first pattern that matches."""


def find_split(splits: Mapping[str, Split], name: str) -> Split:
    """The rule for a parameter. Raises KeyError if no pattern matches: leaving it whole must be a decision."""
    for pattern, split in splits.items():
        if fnmatchcase(name, pattern):
            return split
    raise KeyError(f"no rule says how tensor parallelism splits {name}")


def local_part(weight: Tensor) -> Tensor:
    """What this rank computes with: its part of a parameter that tensor parallelism has split (a DTensor), else all of it."""
    return weight.to_local() if hasattr(weight, "to_local") else weight
