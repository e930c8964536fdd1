"""Tensor, sequence and expert-tensor parallelism compute what one process computes, in float64."""

from dataclasses import replace
from functools import lru_cache
from itertools import chain

import pytest
import torch

from moetrain.models.common.vocabulary import WholeVocabulary
from moetrain.objectives.batch import IGNORE
from moetrain.objectives.language_modeling import LanguageModelingConfig
from moetrain.parallel.collectives import Peers, traffic
from moetrain.parallel.dense import SplitVocabulary, all_gather_rows, reduce_scatter_rows
from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.parallel.parallelize import local, parallelize
from moetrain.parallel.ranks import Ranks
from moetrain.testing.distributed import RankError, run_distributed
from moetrain.testing.layouts import full, local_batches, merge, parameters_of, train_steps
from moetrain.testing.scenarios import SCENARIOS, compare
from moetrain.testing.tolerances import assert_close
from moetrain.train import checkpoint
from moetrain.train.checkpoint import Checkpointer
from moetrain.train.metrics import Phases
from moetrain.train.optim import AdamWConfig
from moetrain.train.state import all_tensors
from moetrain.train.step import accumulate_gradients, count_units, evaluate_loss


def changed(name, **model):
    """A scenario with other sizes of the model."""
    return replace(SCENARIOS[name], model=replace(SCENARIOS[name].model, **model))


SCENARIOS = SCENARIOS | {
    "four_heads": changed("padded", num_heads=8, num_kv_heads=4, head_dim=4),
    "tied": changed("deepseek", tie_embeddings=True),
    # neither the vocabulary nor a dense width is a multiple of the ranks, and runs of tokens end inside sequences
    "uneven": replace(changed("padded", dense_width=23, shared_width=7, num_heads=6, head_dim=4), vocab_size=41, seq_len=10, batch_size=6),
    "glam_accumulate": replace(SCENARIOS["glam_capacity"], micro_batch_size=2, pad=False),
}
TWO = Layout("ep", 1, 1, tensor=2)
SHARDED = Layout("ep", 1, 2, tensor=2)
REPLICATED = Layout("ep", 2, 1, tensor=2)
FSDP = Layout("fsdp", 1, 2, tensor=2)
SPLIT_TWO = Layout("ep", 1, 1, tensor=2, expert_tensor=2)
SPLIT_SHARDED = Layout("ep", 1, 2, tensor=2, expert_tensor=2)
SPLIT_SLICED = Layout("ep", 1, 1, tensor=4, expert_tensor=2)
COPIES = Layout("fssdp", 1, 2, FSSDPSettings(reshard_every=2), tensor=2)
SPLIT_COPIES = Layout("fssdp", 1, 2, FSSDPSettings(rematerialize=True, prediction="last"), tensor=2, expert_tensor=2)
CASES = [
    ("deepseek", TWO), ("deepseek", REPLICATED), ("deepseek", FSDP), ("deepseek", SPLIT_SHARDED), ("padded", SHARDED),
    ("tied", TWO), ("uneven", SHARDED), ("uneven", Layout("ep", 1, 1, tensor=3)), ("four_heads", Layout("ep", 1, 1, tensor=4)),
    ("four_heads", SPLIT_SLICED), ("glam_capacity", SHARDED), ("glam_capacity", SPLIT_TWO), ("glam_accumulate", REPLICATED),
    ("glam_accumulate", SPLIT_SHARDED), ("global_balance", SHARDED), ("aux_free", FSDP), ("zero_experts", TWO),
    ("zero_experts", SPLIT_TWO), ("recompute", SHARDED), ("recompute", SPLIT_SHARDED), ("accumulate", SHARDED), ("ragged", TWO),
    ("ragged_recompute", SPLIT_TWO), ("all_to_one", SHARDED), ("fewer_experts_than_ranks", SHARDED), ("padded", COPIES),
    ("recompute", SPLIT_COPIES), ("stochastic", SHARDED), ("momentum", SPLIT_TWO), ("ragged", TWO),
    ("recurrent", SHARDED), ("recurrent_recompute", SPLIT_TWO),
    ("gating_residuals", SHARDED), ("gating_residuals_recompute", SPLIT_TWO),
]  # fmt: skip


def describe(value):
    if not isinstance(value, Layout):
        return str(value)
    return f"{value.name}-r{value.replicate}s{value.shard}t{value.tensor}e{value.expert_tensor}"


@lru_cache
def one_process(name):
    return train_steps(0, 1, SCENARIOS[name], "single")


@pytest.mark.parametrize(("name", "layout"), CASES, ids=describe)
def test_splitting_matrices_changes_nothing(name, layout):
    compare(merge(run_distributed(train_steps, layout.world_size, SCENARIOS[name], layout)), one_process(name))


def place(rank, layout, scenario, seed=0):
    ranks = Ranks(rank, layout.world_size, rank, layout.world_size)
    with torch.device("meta"):
        model = scenario.model.build(scenario.parts, vocab_size=scenario.vocab_size, dtype=scenario.dtype)
    placed = parallelize(model, layout, ranks, device=torch.device("cpu"))
    placed.initialise(seed)
    return placed, AdamWConfig(lr=scenario.lr).build(placed), ranks.data_parallel(layout.tensor)


def step_and_save(rank, world_size, layout, scenario, folder, async_save=False):
    """One optimizer step, and a checkpoint of it. Returns this rank's weights, and the held-out loss of other data."""
    placed, optimizer, ranks = place(rank, layout, scenario)
    batches = local_batches(scenario, 0, ranks)
    objective = LanguageModelingConfig(output_z_loss=0.1).build()
    totals, _ = count_units(batches, placed)
    accumulate_gradients(placed, objective, batches, totals, seed=0, step=0, total_steps=2, phases=Phases())
    optimizer.step()
    weights, tensors = full(parameters_of(placed)), all_tensors(placed, optimizer)
    with Checkpointer(folder, keep=1, async_save=async_save) as checkpointer:
        checkpointer.save(1, tensors, {})
        if async_save:  # what is written later is what was there when it was saved
            for tensor in tensors.values():
                local(tensor).zero_()
    return weights, evaluate_loss(placed, objective, local_batches(scenario, 7, ranks))


def load(rank, world_size, layout, scenario, folder):
    """All tensors of the checkpoint as this layout reads them, and the held-out loss with its weights."""
    placed, optimizer, ranks = place(rank, layout, scenario, seed=1)
    checkpoint.load(folder / "step-00000001", all_tensors(placed, optimizer), complete=True)
    loss = evaluate_loss(placed, LanguageModelingConfig().build(), local_batches(scenario, 7, ranks))
    return full(all_tensors(placed, optimizer)), loss


def everywhere(function, layout, *arguments):
    """What the ranks return, tensors united."""
    results = (
        run_distributed(function, layout.world_size, layout, *arguments) if layout.world_size > 1 else [function(0, 1, layout, *arguments)]
    )
    assert all(loss == results[0][1] for _, loss in results), "ranks disagree"
    return dict(chain.from_iterable(tensors.items() for tensors, _ in results)), results[0][1]


@pytest.mark.parametrize("name", ["uneven", "glam_capacity"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (SHARDED, Layout("single", 1, 1)),
        (Layout("single", 1, 1), SPLIT_SHARDED),
        (SPLIT_TWO, Layout("fsdp", 1, 2)),
        (REPLICATED, SPLIT_TWO),
    ],
    ids=describe,
)
def test_checkpoints_do_not_know_who_held_what(tmp_path, name, source, target):
    scenario = SCENARIOS[name]
    weights, loss = everywhere(step_and_save, source, scenario, tmp_path)
    tensors, again = everywhere(load, target, scenario, tmp_path)
    assert tensors.keys() == checkpoint.read_info(tmp_path / "step-00000001").shapes.keys()
    for key, value in weights.items():
        assert torch.equal(tensors[f"model.{key}"], value), key
    assert_close(torch.tensor(again), torch.tensor(loss), kind="layout")
    reference, _ = everywhere(step_and_save, Layout("single", 1, 1), scenario, tmp_path / "single")
    assert_close(weights, reference, kind="layout")


def test_a_checkpoint_is_written_in_the_background_while_training_goes_on(tmp_path):
    scenario = SCENARIOS["uneven"]
    weights, _ = everywhere(step_and_save, SPLIT_TWO, scenario, tmp_path, True)
    tensors, _ = everywhere(load, Layout("single", 1, 1), scenario, tmp_path)
    assert all(torch.equal(tensors[f"model.{key}"], value) for key, value in weights.items())
    assert any(tensors[f"optim.{key}.exp_avg"].any() for key in weights if ".experts." in key)


def norm_of_known_gradients(rank, world_size, layout):
    """Squares that sum to 20 on even ranks and to 100 on odd ones in owned experts, and to 25 in what all ranks share."""
    placed, _, _ = place(rank, layout, SCENARIOS["deepseek"])
    for _, parameter in placed.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = {name: parameter.grad for name, parameter in placed.parameters()}
    gradients["layers.1.ffn.experts.w_in"].view(-1)[:2] = torch.tensor([6.0, 8.0] if rank % 2 else [2.0, 4.0])
    before = placed.clip_gradients(None).item()
    gradients["norm.weight"].to_local().view(-1)[:1] = 5.0 if layout.shard == 1 or placed.data.rank() == 0 else 0.0
    return before, placed.clip_gradients(1.0).item(), placed.clip_gradients(None).item()


@pytest.mark.parametrize(
    ("layout", "times"), [(Layout("ep", 1, 2), 1), (TWO, 1), (SPLIT_TWO, 1), (SHARDED, 2), (REPLICATED, 1)], ids=describe
)
def test_the_norm_counts_every_parameter_once(layout, times):
    for experts, total, clipped in run_distributed(norm_of_known_gradients, layout.world_size, layout):
        assert experts == pytest.approx((120 * times) ** 0.5, abs=1e-12)  # 10.954452; a mean of norms would be 7.236068
        assert total == pytest.approx((120 * times + 25) ** 0.5, abs=1e-12)
        assert clipped == pytest.approx(1.0, abs=1e-12)


def vocabulary_terms(vocabulary, embed, head, tokens, targets, peers=None):
    """Loss terms and their gradients; with peers, of this rank's part of the vocabulary."""
    embed, head = (t.clone().requires_grad_() for t in (embed, head))
    x = vocabulary.embed(tokens, embed)
    x = x.flatten(0, 1) if peers is None else all_gather_rows(x, peers)
    logits = x @ head.t()
    nll = vocabulary.negative_log_likelihood(logits, targets, ignore=IGNORE)
    squared = vocabulary.log_partition(logits).square().sum()
    fused, z = vocabulary.cross_entropy(x, head, targets, ignore=IGNORE, z_weight=0.1)
    ((nll + 0.3 * squared + fused) / (1 if peers is None else peers.size)).backward()
    return nll.detach(), squared.detach(), fused.detach(), z, embed.grad, head.grad


def split_vocabulary(rank, world_size, embed, head, tokens, targets):
    peers = Peers(torch.distributed.group.WORLD, (0,) * world_size)
    embed, head = (t.chunk(world_size)[rank] for t in (embed, head))
    return vocabulary_terms(SplitVocabulary(7, peers), embed, head, tokens, targets, peers)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_split_vocabulary_gives_the_loss_and_gradients_of_the_whole(ranks):
    generator = torch.Generator().manual_seed(0)
    embed, head = (20 * torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens, targets = (torch.randint(7, shape, generator=generator) for shape in ((2, 6), (12,)))
    targets[[0, 5, 11]] = IGNORE
    expected = vocabulary_terms(WholeVocabulary(), embed, head, tokens, targets)
    results = run_distributed(split_vocabulary, ranks, embed, head, tokens, targets)
    for term in range(4):
        for result in results:
            assert_close(result[term], expected[term], kind="layout")
    for part in (4, 5):
        assert_close(torch.cat([result[part] for result in results]), expected[part], kind="layout")


def adjoint(rank, world_size):
    """<gather(x), y> and <x, scatter(y)> summed over ranks, and the bytes sent."""
    peers = Peers(torch.distributed.group.WORLD, (0, 0, 1))
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in (2, 2 * world_size))
    traffic.clear()
    gathered, scattered = all_gather_rows(x, peers), reduce_scatter_rows(y, peers)
    sent = dict(traffic.bytes)
    (gathered * y.detach()).sum().backward()
    assert torch.equal(x.grad, scattered.detach())
    (scattered * x.detach()).sum().backward()
    assert torch.equal(y.grad, gathered.detach())
    return sent


def test_gathering_and_scattering_are_each_others_gradient_and_count_their_bytes():
    for rank, sent in enumerate(run_distributed(adjoint, 3)):
        tiers = {"inter": 2} if rank == 2 else {"intra": 1, "inter": 1}
        assert sent == {(kind, tier): n * 2 * 4 * 8 for kind in ("tensor_all_gather", "tensor_reduce_scatter") for tier, n in tiers.items()}


def refuse(rank, world_size, scenario, layout):
    place(rank, layout, scenario)


def test_a_split_that_leaves_a_rank_without_a_part_is_refused_with_its_parameter():
    scenario = changed("four_heads", shared_width=3)
    with pytest.raises(RankError, match="ConfigError.*parallel.tensor = 4.*layers.1.ffn.shared.w_gate.weight with 3"):
        run_distributed(refuse, 4, scenario, Layout("ep", 1, 1, tensor=4))
