"""Replays the vectors ``deepseekmoe``: the whole model with gradients, and one MoE layer."""

import torch
from replay import context

from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.testing.golden import golden
from moetrain.testing.tolerances import assert_close

SLUG = "deepseekmoe"
META, DATA = golden(SLUG)
C = META["config"]
E, F = C["n_routed_experts"], C["moe_intermediate_size"]


def model():
    config = DeepSeekMoEConfig(
        hidden_size=C["hidden_size"], num_layers=C["num_hidden_layers"], num_heads=C["num_attention_heads"],
        num_kv_heads=C["num_key_value_heads"], head_dim=C["hidden_size"] // C["num_attention_heads"], num_experts=E,
        top_k=C["num_experts_per_tok"], expert_width=F, shared_width=(C["n_shared_experts"] or 0) * F,
        dense_layers=C["first_k_dense_replace"], dense_width=C["intermediate_size"], norm_eps=C["rms_norm_eps"], rope_theta=C["rope_theta"],
    )  # fmt: skip
    scope = "sequence" if C["seq_aux"] else "rank"
    parts = MoEParts(
        router=TopKRouterConfig(
            top_k=C["num_experts_per_tok"], score=C["scoring_func"], renormalise=C["norm_topk_prob"], renormalise_epsilon=1e-20
        ),
        experts=FFNExpertsConfig(num_experts=E, width=F),
        capacity=DroplessConfig(),
        loss={"balance": ExpertBalanceConfig(coefficient=C["aux_loss_alpha"], scope=scope)},
    )
    made = config.build(parts, vocab_size=C["vocab_size"], dtype=torch.float64)
    made.load_state_dict(ours(stored("params.")))
    return made.train()


def stored(prefix):
    return {key[len(prefix) :]: value for key, value in DATA.items() if key.startswith(prefix)}


def ours(params):
    """Tensors of a released checkpoint under our names."""
    named = {
        "embed": params["model.embed_tokens.weight"],
        "norm.weight": params["model.norm.weight"],
        "head.weight": params["lm_head.weight"],
    }
    for layer in range(C["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        named[new + "attn_norm.weight"] = params[old + "input_layernorm.weight"]
        named[new + "ffn_norm.weight"] = params[old + "post_attention_layernorm.weight"]
        for letter in "qkvo":
            named[f"{new}attn.w_{letter}.weight"] = params[f"{old}self_attn.{letter}_proj.weight"]
        if old + "mlp.gate.weight" not in params:
            for part in ("gate", "up", "down"):
                named[f"{new}ffn.w_{part}.weight"] = params[f"{old}mlp.{part}_proj.weight"]
            continue
        named[new + "ffn.router.weight"] = params[old + "mlp.gate.weight"]
        expert = lambda e, part: params[f"{old}mlp.experts.{e}.{part}_proj.weight"]  # noqa: B023, E731
        named[new + "ffn.experts.w_in"] = torch.stack([torch.cat([expert(e, "gate"), expert(e, "up")]) for e in range(E)])
        named[new + "ffn.experts.w_out"] = torch.stack([expert(e, "down") for e in range(E)])
        for part in ("gate", "up", "down"):
            key = f"{old}mlp.shared_experts.{part}_proj.weight"
            if key in params:
                named[f"{new}ffn.shared.w_{part}.weight"] = params[key]
    return named


def test_deepseekmoe_model():
    made, ids = model(), DATA["model.input_ids"]
    ctx = ForwardContext(batch_size=ids.shape[0], seq_len=ids.shape[1], training=True)
    logits = made(ids, ctx)
    assert_close(logits, DATA["model.logits"], kind="golden")
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(loss, DATA["model.ce_loss"][0], kind="golden")
    assert_close(ctx.losses["balance"], DATA["model.aux_loss_per_layer"].sum(), kind="golden")
    (loss + ctx.losses["balance"]).backward()
    expected = ours(stored("grads."))
    for name, parameter in made.named_parameters():
        assert_close(parameter.grad, expected[name], kind="golden", name=name)


def test_deepseekmoe_layer():
    layer, x = model().layers[-1].ffn, DATA["layer.x"].clone().requires_grad_()
    ctx = context(x.shape[0] * x.shape[1], batch_size=x.shape[0])
    y = layer(x, ctx)
    assert_close(y, DATA["layer.y"], kind="golden")
    assert_close(ctx.forward.losses["balance"], DATA["layer.aux"][0], kind="golden")
    ((y * DATA["layer.dy"]).sum() + ctx.forward.losses["balance"]).backward()
    assert_close(x.grad, DATA["layer.dx"], kind="golden")
    assert_close(layer.router.weight.grad, DATA["layer.dgate"], kind="golden")
