"""moetrain's MoELayer, on several ranks under the layout ``ep``."""

from __future__ import annotations

from torch import Tensor

from moetrain.parallel.collectives import traffic
from moetrain.testing.layer_bench import AutogradLayer, LayerCase, OwnLayer

PACKAGE = None


def build(case: LayerCase, inputs: dict[str, Tensor], variant: str) -> AutogradLayer:
    """No variants."""
    return OwnLayer.ready(case, inputs)


def take_traffic() -> int:
    """Bytes of rows sent to other ranks since the last call."""
    sent = sum(count for (kind, _), count in traffic.bytes.items() if kind in ("dispatch", "combine"))
    traffic.clear()
    return sent
