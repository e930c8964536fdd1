"""Replays the vectors ``glam``: a whole model with gradients, and one MoE layer with drops."""

import torch
from replay import context, dense_map

from moetrain.models.glam import GLaMConfig
from moetrain.moe.capacity.policies import SlotsConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.losses.balance import SwitchBalanceConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.objectives.batch import IGNORE, Batch
from moetrain.objectives.language_modeling import LanguageModelingConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "glam"
META, DATA = golden(SLUG)
C = META["config"]


def parts():
    # the gating groups are equal runs of the batch's tokens
    groups = C["groups"]
    return MoEParts(
        router=TopKRouterConfig(top_k=2, renormalise=True, renormalise_epsilon=1e-9),
        experts=FFNExpertsConfig(num_experts=C["E"], width=C["F"], activation="relu", gated=False),
        capacity=SlotsConfig(factor=C["capacity_factor"], choices=1, round="down", multiple=4, scope="rank", num_groups=groups),
        loss={"balance": SwitchBalanceConfig(coefficient=C["aux_weight"], scope="rank", num_groups=groups)},
    )


def model():
    config = GLaMConfig(
        hidden_size=C["D"], num_layers=C["L"], num_heads=C["H"], head_dim=C["dh"], num_experts=C["E"], expert_width=C["F"],
        dense_width=C["F"], num_buckets=C["num_buckets"], max_distance=C["max_distance"],
    )  # fmt: skip
    return config.build(parts(), vocab_size=C["V"], dtype=torch.float64)


def ours(params):
    """Stored tensors (matrices [in, out]) under our names (matrices [out, in])."""
    t = lambda x: x.transpose(-2, -1)  # noqa: E731
    named = {"embed": params["emb"], "norm.weight": params["ln_f"]}
    for layer in range(C["L"]):
        old, new = f"layers.{layer}.", f"layers.{layer}."
        named |= {
            new + "attn_norm.weight": params[old + "ln_attn"],
            new + "ffn_norm.weight": params[old + "ln_ffn"],
            new + "attn.bias.weight": params[old + "rel_bias"],
            new + "attn.w_q.weight": t(params[old + "wq"]),
            new + "attn.w_k.weight": t(params[old + "wk"]),
            new + "attn.w_v.weight": t(params[old + "wv"]),
            new + "attn.w_o.weight": t(params[old + "wo_attn"]),
        }
        if old + "gate" in params:
            named |= {
                new + "ffn.router.weight": t(params[old + "gate"]),
                new + "ffn.experts.w_in": t(params[old + "wi"]),
                new + "ffn.experts.w_out": t(params[old + "wo"]),
            }
        else:
            named |= {
                new + "ffn.w_gate.weight": t(params[old + "wi_gate"]),
                new + "ffn.w_up.weight": t(params[old + "wi"]),
                new + "ffn.w_down.weight": t(params[old + "wo"]),
            }
    return named


def stored(prefix):
    return {key[len(prefix) :]: value for key, value in DATA.items() if key.startswith(prefix)}


def filled():
    made = model()
    made.load_state_dict(ours(stored("params.")))
    return made.train()


def test_glam_model():
    made, ids = filled(), DATA["model.input_ids"]
    batch, length = ids.shape
    targets = torch.cat([ids[:, 1:], torch.full((batch, 1), IGNORE)], dim=1)
    ctx = ForwardContext(batch_size=batch, seq_len=length, training=True)
    assert_close(made(ids, ctx), DATA["model.logits"], kind="golden")
    assert_close(ctx.losses["balance"] / C["aux_weight"], DATA["model.aux_loss_per_layer"].sum(), kind="golden")

    ctx = ForwardContext(batch_size=batch, seq_len=length, training=True)
    objective = LanguageModelingConfig(output_z_loss=C["z_weight"]).build()
    terms = objective(made, Batch(ids, targets, torch.arange(batch)), ctx)
    predicted = batch * (length - 1)
    assert_close(terms.main / predicted, DATA["model.ce_loss"][0], kind="golden")
    assert_close(terms.extra["output_z_loss"] / predicted / C["z_weight"], DATA["model.z_loss"][0], kind="golden")
    loss = (terms.main + terms.extra["output_z_loss"]) / predicted + ctx.losses["balance"]
    assert_close(loss, DATA["model.loss"][0], kind="golden")
    loss.backward()
    expected = ours(stored("grads."))
    for name, parameter in made.named_parameters():
        assert_close(parameter.grad, expected[name], kind="golden", name=name)


def test_glam_layer_with_drops():
    layer = filled().layers[0].ffn
    x = DATA["layer.x"].clone().requires_grad_()
    tokens, experts = x.shape[0] * x.shape[1], C["E"]
    ctx = context(tokens, batch_size=x.shape[0])
    routing = layer.router(x.reshape(tokens, -1), ctx)
    executed = layer.capacity(routing, ctx)
    assert layer.capacity.capacity(tokens // C["groups"], 2, experts, training=True) == META["capacity"]
    index = torch.stack([DATA["layer.index_1"].flatten(), DATA["layer.index_2"].flatten()], dim=1)
    assert torch.equal(routing.expert_TK, index)
    kept = torch.stack([DATA["layer.kept_1"].flatten(), DATA["layer.kept_2"].flatten()], dim=1).bool()
    assert torch.equal(executed.expert_TK >= 0, kept)
    gates = torch.stack([DATA["layer.gate_1"].flatten(), DATA["layer.gate_2"].flatten()], dim=1)
    assert_close(executed.weight_TK, gates, kind="golden")
    assert int(executed.dispatched.max()) <= META["capacity"] * C["groups"]
    _, weight = dense_map(executed)
    assert bool((weight.sum(1) <= 1 + 1e-9).all())

    balance = SwitchBalanceConfig(scope="rank", num_groups=C["groups"]).build()(routing, ctx)
    assert_close(balance, DATA["layer.aux"][0], kind="golden")
    y = layer.executor(x.reshape(tokens, -1), executed, layer.experts, ctx).view_as(x)
    assert_close(y, DATA["layer.y"], kind="golden")
    ((y * DATA["layer.dy"]).sum() + balance).backward()
    assert_close(x.grad, DATA["layer.dx"], kind="golden")
