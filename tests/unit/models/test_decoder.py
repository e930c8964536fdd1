"""The decoder models: causality, documents, decoding with a cache, sizes, initial weights."""

import pytest
import torch

from moetrain.models.common.attention import KeyValueCache
from moetrain.models.common.positions import RelativeBias
from moetrain.models.deepseek_moe import DeepSeekMoEConfig
from moetrain.models.glam import GLaMConfig
from moetrain.moe.capacity.policies import DroplessConfig
from moetrain.moe.context import ForwardContext
from moetrain.moe.experts.ffn import FFNExpertsConfig
from moetrain.moe.layer import MoEParts
from moetrain.moe.losses.balance import ExpertBalanceConfig
from moetrain.moe.routers.topk import TopKRouterConfig
from moetrain.parallel.layouts import Layout
from moetrain.parallel.parallelize import parallelize
from moetrain.parallel.ranks import Ranks
from moetrain.train.flops import FlopCounter, count_parameters

V = 37
DEEPSEEK = DeepSeekMoEConfig(
    hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=6, top_k=2, expert_width=8, shared_width=8,
    dense_width=24, init_std=0.3,
)  # fmt: skip
GLAM = GLaMConfig(
    hidden_size=16, num_layers=2, num_heads=2, head_dim=8, num_experts=6, expert_width=8, dense_width=24, num_buckets=8, max_distance=6
)


def parts(num_experts, top_k, width, gated=True):
    return MoEParts(
        router=TopKRouterConfig(top_k=top_k),
        experts=FFNExpertsConfig(num_experts=num_experts, width=width, gated=gated),
        capacity=DroplessConfig(),
        loss={"balance": ExpertBalanceConfig()},
    )


def build(config, dtype=torch.float64, seed=0):
    with torch.device("meta"):
        model = config.build(parts(config.num_experts, config.top_k, config.expert_width), vocab_size=V, dtype=dtype)
    placed = parallelize(model, Layout("single", 1, 1), Ranks(), device=torch.device("cpu"))
    placed.initialise(seed)
    return model


def forward(model, tokens, **kwargs):
    return model(tokens, ForwardContext(batch_size=tokens.shape[0], seq_len=tokens.shape[1]), **kwargs)


@pytest.fixture(params=[DEEPSEEK, GLAM], ids=["deepseek_moe", "glam"])
def model(request):
    return build(request.param)


@pytest.fixture
def tokens():
    return torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))


def test_later_tokens_do_not_change_earlier_logits(model, tokens):
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    a, b = forward(model, tokens), forward(model, changed)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-12)  # rows are grouped differently, so not bit for bit
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_masked_documents_do_not_see_each_other(model, tokens):
    document = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]).expand(2, -1)
    changed = tokens.clone()
    changed[:, :4] = (changed[:, :4] + 1) % V
    a, b = forward(model, tokens, document=document), forward(model, changed, document=document)
    assert torch.allclose(a[:, 4:], b[:, 4:], atol=1e-12)
    assert not torch.allclose(forward(model, tokens)[:, 4:], forward(model, changed)[:, 4:])


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 1, 1, 3], [5, 4]])
def test_decoding_with_a_cache_gives_the_logits_of_one_pass(model, tokens, cuts):
    cache = KeyValueCache()
    with torch.no_grad():
        pieces = [forward(model, part, cache=cache) for part in tokens.split(cuts, dim=1)]
        whole = forward(model, tokens)
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-12)


def test_initial_weights_follow_the_seed_and_the_names():
    a, b, c = build(DEEPSEEK), build(DEEPSEEK), build(DEEPSEEK, seed=1)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert "norm" in name or not torch.equal(x, z), name
    experts = a.layers[1].ffn.experts
    assert not torch.equal(experts.w_in[0], experts.w_in[1])
    single = build(DEEPSEEK, dtype=torch.float32)
    assert abs(single.layers[0].attn.w_q.weight.std().item() - 0.3) < 0.1


def test_bfloat16_computes_in_bfloat16_with_float32_masters(tokens):
    wide, narrow = build(DEEPSEEK, dtype=torch.float32), build(DEEPSEEK, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in narrow.parameters())
    logits = forward(narrow, tokens)
    assert logits.dtype == torch.float32
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in narrow.parameters())
    assert (logits - forward(wide, tokens)).abs().max() < 0.3


def test_relative_bias_buckets():
    bias = RelativeBias(2, num_buckets=8, max_distance=20, dtype=torch.float64)
    buckets = bias.bucket(torch.arange(60))
    assert buckets[:4].tolist() == [0, 1, 2, 3]
    assert bool((buckets.diff() >= 0).all()) and buckets[20:].unique().tolist() == [7]
    torch.nn.init.normal_(bias.weight)
    near, far = bias(torch.arange(5), torch.arange(5)), bias(torch.arange(5) + 100, torch.arange(5) + 100)
    assert torch.equal(near, far)


def meta(config, gated, vocab_size):
    with torch.device("meta"):
        return config.build(parts(config.num_experts, config.top_k, config.expert_width, gated), vocab_size=vocab_size, dtype=torch.float32)


def preset(name):
    from moetrain.config import load
    from moetrain.launch.compose import compose
    from moetrain.train.settings import Config

    return load(Config, compose(f"model={name}"))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("deepseek_moe_2b", 2.0e9, 0.3e9), ("deepseek_moe_16b", 16.4e9, 2.8e9), ("glam_1_9b", 1.9e9, 0.145e9)],
)
def test_preset_sizes_are_the_papers(name, total, active):
    config = preset(name)
    model = meta(config.model, config.experts.gated, 8192)
    assert count_parameters(model) == pytest.approx(total, rel=0.05)
    inactive = sum(
        parameter.numel() * (1 - config.model.top_k / config.model.num_experts)
        for layer in model.moe_layers().values()
        for parameter in layer.experts.parameters()
    )
    assert count_parameters(model) - inactive == pytest.approx(active, rel=0.1)


def test_the_dense_preset_has_the_active_size_of_the_default():
    moe, dense = preset("deepseek_moe_tiny"), preset("dense_tiny")
    counters = [FlopCounter(meta(c.model, True, 4096)) for c in (moe, dense)]
    routed = counters[0].step(1, 1, {name: moe.model.top_k for name in counters[0].per_row})
    router = 3 * 2 * moe.model.hidden_size * moe.model.num_experts * len(counters[0].per_row)
    assert routed - router == counters[1].step(1, 1, {})


def test_flops_of_a_dense_product_by_hand():
    model = meta(DEEPSEEK, True, V)
    counter = FlopCounter(model)
    linear = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n != "embed" and "router" not in n)
    router = sum(p.numel() for n, p in model.named_parameters() if "router" in n)
    attention = 3 * 4 * 4 * 2 * 2 * (9 + 1) / 2
    expected = 3 * (10 * (2 * (linear + router) + attention) + 7 * 2 * 3 * 16 * 8)
    assert counter.step(10, 9, {"layers.1.ffn": 7, "layers.2.ffn": 0}) == expected
