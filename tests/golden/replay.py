"""Feeding stored logits to routers and losses."""

import torch

from moetrain.moe.context import ForwardContext, RouterContext
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.routers.topk import TopKRouter, TopKRouterConfig


def context(tokens, *, batch_size=1, valid=None, training=True, reducer=None):
    forward = ForwardContext(batch_size=batch_size, seq_len=tokens // batch_size, valid=valid, training=training, reducer=reducer)
    return forward.at("golden")


def router(hidden_size, num_experts, dtype, **settings):
    made = TopKRouter(TopKRouterConfig(**settings), hidden_size, num_experts, dtype=dtype)
    if made.selection_bias is not None:
        made.selection_bias.zero_()
    return made


def route_logits(logits, ctx, *, bias=None, num_experts=None, **settings):
    """A TopKRouter's routing of given logits."""
    made = router(1, (num_experts or logits.shape[1]), logits.dtype, selection_bias=bias is not None, **settings)
    if bias is not None:
        made.selection_bias = bias.to(logits.dtype)
    return made.route(logits, ctx)


def dense_map(routing):
    """Routing as (selected [T, E] bool, weight [T, E])."""
    columns = routing.selected.numel()
    weight = torch.zeros(routing.num_tokens, columns, dtype=routing.weight.dtype)
    selected = torch.zeros(routing.num_tokens, columns, dtype=torch.bool)
    real = routing.expert >= 0
    index = (routing.token[real], routing.expert[real])
    return selected.index_put(index, torch.tensor(True)), weight.index_put(index, routing.weight[real])


class DrawnContext(RouterContext):
    """A layer's context in which the noise of a site is what a reference drew: tensors [T, width] by site."""

    def __init__(self, ctx, draws):
        super().__init__(ctx.forward, ctx.layer, ctx.family)
        object.__setattr__(self, "recorded", draws)

    def uniform(self, site, width, *, per="token", dtype=torch.float32, device=None):
        draws = self.recorded[site].to(dtype)
        assert draws.shape[1] == width
        return draws


def place_map(routing, place, capacity):
    """Weights as [T, E, C]: an entry stands at its place in its expert's buffer."""
    real = routing.expert >= 0
    index = (routing.token[real], routing.expert[real], place[real])
    shape = (routing.num_tokens, routing.selected.numel(), capacity)
    return torch.zeros(shape, dtype=routing.weight.dtype).index_put(index, routing.weight[real])


def stack_experts(data, prefix, experts, names):
    """(w_in, w_out) of FFNExperts from ``<prefix>.<expert>.<name>.weight``; names: of the gate, up and down matrices."""
    gate, up, down = ([data[f"{prefix}.{e}.{name}.weight"] for e in experts] for name in names)
    return torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)]), torch.stack(down)


def biased_experts(w1, b1, w2, b2):
    """Experts relu(x w1^T + b1) w2^T + b2 for inputs with a one appended: a hidden unit that is always one holds b2."""
    experts, width, hidden = w1.shape
    made = FFNExpertsConfig(num_experts=experts, width=width + 1, activation="relu", gated=False).build(hidden + 1, dtype=w1.dtype)
    w_in, w_out = torch.zeros_like(made.w_in), torch.zeros_like(made.w_out)
    w_in[:, :width] = torch.cat([w1, b1[:, :, None]], dim=2)
    w_in[:, width, hidden] = 1
    w_out[:, :hidden] = torch.cat([w2, b2[:, :, None]], dim=2)
    made.load_state_dict({"w_in": w_in, "w_out": w_out})
    return made


def append_one(x):
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
