"""The example's one test: run it where the example is installed."""

import torch

from moetrain.moe.context import ForwardContext
from moetrain.registry import lookup


def test_experts_are_those_near_the_best() -> None:
    import my_router  # noqa: F401  as the entry point does

    router = lookup("router", "my_router")(ratio=0.5).build(3, 3, dtype=torch.float64)
    router.load_state_dict({"weight": torch.eye(3, dtype=torch.float64)})
    ctx = ForwardContext(batch_size=1, seq_len=2).at("layers.0")
    routing = router(torch.tensor([[0.0, -0.6, -0.8], [0.0, 0.0, 5.0]], dtype=torch.float64), ctx)
    assert routing.token.tolist() == [0, 0, 1] and routing.expert.tolist() == [0, 1, 2]  # exp(-0.6) > 1/2 > exp(-0.8)
