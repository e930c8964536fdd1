"""moetrain's MoELayer."""

from __future__ import annotations

from torch import Tensor

from moetrain.testing.layer_bench import AutogradLayer, LayerCase, OwnLayer

PACKAGE = None


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """No variants."""
    return OwnLayer.ready(case, inputs)
