"""Processor time of every router and preset, forward and backward as an MoE layer calls it in training, against the plain top-k
router in interleaved rounds.

The plain one is ``router=topk``: softmax, top-k, raw weights. Routers start as in the first step of training; those that
read the layer before get its state. A router with fixed k and one matrix may cost 1.3 times the plain one; the others have
the bounds of BOUNDS, each with what it pays for. Ends with status 1 if a median is above its bound.

usage: python scripts/bench/router_cost.py [--rounds 15] [--only NAME ...] [--out FILE.jsonl]
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import Tensor

from moetrain import registry
from moetrain.config import load
from moetrain.launch.compose import fill_config_store, shipped
from moetrain.moe.context import ForwardContext
from moetrain.moe.routers.base import Router
from moetrain.train.settings import Config

B, S, D, E, K = 8, 512, 512, 64, 4
T = B * S
PLAIN, LINEAR = "topk", 1.3
BOUNDS: dict[str, tuple[float, str]] = {
    # by preset, else by the router it is a preset of
    "switch": (2.6, "input jitter: a random number for each of T D inputs"),
    "tutel": (1.6, "normal noise on T E logits, in float64"),
    "noisy_topk": (2.3, "a second matrix, normal noise"),
    "cosine_topk": (4.2, "a projection to 256 dimensions: 4.5 times the products"),
    "moduleformer": (4.0, "a hidden layer of 256 units: 4.5 times the products"),
    "moe_plus_plus_released": (8.5, "a hidden layer of 544 units: 10 times the products"),
    "recurrent_topk": (5.0, "projection and GRU of width 128: 5 times the products"),
    "adamoe": (2.2, "twice the columns: as many null experts"),
    "longcat": (2.0, "twice the columns: as many copy experts"),
    "comet": (12.0, "4 trees: 8 times the products, probabilities of 4 E leaves"),
    "comet_plus": (14.0, "as comet, and Sinkhorn iterations of 4 permutations of E"),
    "dselect_k": (4.0, "codes: probabilities of 4 E leaves of 6 bits"),
    "sparsemixer": (2.0, "K rounds of softmax and selection"),
    "base": (14.0, "an auction in each sequence, bid by bid"),
    "sinkhorn": (2.0, "scaling of T x E scores until they are even: few rounds at the start, more for sharper logits"),
    "quantile_topk": (2.5, "a sort of E margins along the tokens"),
    "expert_choice": (1.7, "selection along the tokens, a ragged routing"),
    "top_p": (2.7, "a sort of E probabilities, a ragged routing"),
    "dense_to_sparse": (3.0, "Gumbel noise on T E logits, a ragged routing with any number of choices"),
}
"""Bound, as a multiple of the plain router, and what it pays for."""


def configurations(names: Sequence[str]) -> dict[str, Any]:
    """Configuration of each router at E experts and K choices."""
    fill_config_store()
    found = {}
    sizes = [f"model.num_experts={E}", f"model.top_k={K}", f"model.hidden_size={D}", "loss=[]"]
    with initialize_config_module("moetrain.configs", version_base="1.3"):
        for name in names:
            allowed = ["router.allow_future=true"] if name == "expert_choice" else []
            plain = OmegaConf.to_container(compose("config", [f"router={name}", *sizes, *allowed]), resolve=True)
            assert isinstance(plain, dict)
            plain.pop("hydra", None)
            found[name] = load(Config, {"loss": {}, **plain}).router  # type: ignore[dict-item]
    return found


def build(config: Any) -> Router:
    """The router with random weights, in the first of ten steps."""
    router: Router = config.build(D, E, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02, generator=generator)
    router.begin_step(0, 10)
    return router


def timed(router: Router) -> Callable[[], float]:
    """A call that runs the router forward and backward and returns its processor time in seconds."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=generator).requires_grad_()
    tokens = torch.randint(4096, (T,), generator=generator)

    def context(carry: dict[str, Any]) -> ForwardContext:
        made = ForwardContext(batch_size=B, seq_len=S, token_id=tokens, training=True, total_steps=10)
        made.carry = dict(carry)
        return made

    before = context({})
    weight = router(x, before.at("layers.0")).weight
    carry = {name: state.detach() for name, state in before.carry.items() if isinstance(state, Tensor)}
    cotangent = torch.randn(weight.shape, generator=generator)

    def run() -> float:
        x.grad = None
        router.zero_grad(set_to_none=True)
        ctx = context(carry).at("layers.1")
        start = time.process_time()
        weight = router(x, ctx).weight
        if weight.requires_grad:
            gradient = cotangent if weight.shape == cotangent.shape else torch.ones_like(weight)  # ragged: by layer
            weight.backward(gradient)
        return time.process_time() - start

    return run


def measure(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by name; each round runs all of them, in turning order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.disable()
    for turn in range(-2, rounds):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = runs[name]()
            if turn >= 0:
                seconds[name].append(value)
        gc.collect()
    return seconds


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(records: Sequence[dict[str, Any]], setup: dict[str, Any]) -> str:
    lines = [
        f"T={T}, D={D}, E={E}, K={K}, float32, forward and backward in training, one thread; {setup['rounds']} interleaved rounds, "
        f"processor time, medians (min-max). torch {setup['torch']}, {setup['machine']}, load average {setup['load']}.",
        "",
        "| `router=` | of | ms | times the plain router | bound | what it pays for |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        lines.append(
            f"| {record['name']} | {record['kind']} | {spread([1e3 * s for s in record['seconds']], 1)} | {spread(record['ratios'])} "
            f"| {record['bound']} | {record['pays']} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="names; the plain router is always there")
    parser.add_argument("--out", type=Path, help="records; a table goes beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    import moetrain.components  # noqa: F401

    names = list(dict.fromkeys([PLAIN, *(options.only or [*registry.components("router"), *shipped("router")])]))
    configs = configurations(names)
    load_before = os.getloadavg()[0]
    seconds = measure({name: timed(build(config)) for name, config in configs.items()}, options.rounds)
    setup = {
        "rounds": options.rounds,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": f"{load_before:.1f} to {os.getloadavg()[0]:.1f}",
    }
    records = []
    for name, config in configs.items():
        bound, pays = BOUNDS.get(name) or BOUNDS.get(config.kind) or (LINEAR, "")
        ratios = [own / plain for own, plain in zip(seconds[name], seconds[PLAIN], strict=True)]
        records.append({"name": name, "kind": config.kind, "seconds": seconds[name], "ratios": ratios, "bound": bound, "pays": pays})
    print(report(records, setup))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(json.dumps(line) + "\n" for line in ({"setup": setup}, *records)))
        options.out.with_suffix(".md").write_text(report(records, setup))
    over = [record["name"] for record in records if statistics.median(record["ratios"]) > record["bound"]]
    if over:
        print(f"above their bound: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
