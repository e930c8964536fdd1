"""The parts of gpu_suite.py, one a process: ``python gpu_parts.py PART --record FILE.json --out FOLDER``.

Needs torch alone; a part that needs more says so and is skipped. What a part has found is written at once, so that nothing is
lost when its time is over.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import moetrain

PACKAGE = Path(moetrain.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LAYER_SHAPES = [(16384, 2048, 1408, 64, 6), (8192, 4096, 14336, 8, 2)]
"""T, D, F, E, K of fine and coarse experts."""
TINY_SHAPES = [(16, 32, 16, 4, 2)]
SYSTEMS = ("moetrain", "grouped_mm", "transformers", "loop", "scattermoe", "sonicmoe", "megablocks")
TRACE_BYTES = 6_000_000
"""A larger trace is made again without what the host does."""


class Skip(Exception):
    """A part cannot run here; the message says why."""


class Record:
    """What a part has found: ``status`` passed, failed or skipped with a ``reason``; ``headline`` and ``table`` are for people."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def update(self, **found: Any) -> None:
        """Write it down."""
        self.found |= found
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.found))
        draft.replace(self.path)

    def judge(self, passed: bool, reason: str = "") -> None:
        """The part's status."""
        self.update(status="passed" if passed else "failed", reason=None if passed else reason)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def host_seconds(action: Callable[[], Any], repeats: int) -> float:
    """Median of single calls, from the host's launch to the device's end, after two warm-up calls."""
    seconds = []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def device_seconds(action: Callable[[], Any], rounds: int, calls: int = 10) -> float:
    """Median time of a call on the device alone: the host is far ahead of it. On CPU as :func:`host_seconds`."""
    if not CUDA:
        return host_seconds(action, rounds)
    action(), action()
    seconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms, in which all launches are queued
        start.record()
        for _ in range(calls):
            action()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(seconds)


def machine_rates(size: str) -> tuple[float, float]:
    """FLOP/s of one large bfloat16 product, bytes/s of a large copy (read and written)."""
    n, entries = (256, 2**16) if size == "tiny" else (8192, 2**30)
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    out, source = torch.empty_like(a), torch.ones(entries, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * n**3 / device_seconds(lambda: torch.mm(a, b, out=out), 5), 2 * entries / device_seconds(lambda: target.copy_(source), 5)


def run_checks(pipe: Connection, module: str) -> None:
    """A process of :func:`check_all`: sends the names of all checks, then for each name that comes what went wrong or None."""
    torch.set_num_threads(1)
    checks = importlib.import_module(module).checks()
    pipe.send(list(checks))
    while (name := pipe.recv()) is not None:
        try:
            checks[name]()
            outcome = None
        except Exception:
            outcome = traceback.format_exc(limit=-3)
        pipe.send(outcome)


def check_all(module: str, processes: int, every: int, report: Callable[[dict[str, tuple[str | None, float]], int], None]) -> None:
    """Each ``every``-th check of ``module.checks()``, by some processes. report: called after each with what went wrong (or None) and
    seconds of all that have ended, and with the number of those that have not.

    A process whose check broke it or the GPU's context is replaced.
    """
    context = multiprocessing.get_context("spawn")
    pool: dict[Connection, tuple[Any, str | None, float]] = {}
    waiting: deque[str] | None = None
    ended: dict[str, tuple[str | None, float]] = {}
    replaced = 0

    def start() -> None:
        here, there = context.Pipe()
        process = context.Process(target=run_checks, args=(there, module), daemon=True)
        process.start()
        there.close()
        pool[here] = process, None, time.monotonic()

    for _ in range(processes):
        start()
    while pool:
        ready = wait(list(pool))
        for pipe in [pipe for pipe in pool if pipe in ready]:
            process, name, began = pool.pop(pipe)
            try:
                answer, broken = pipe.recv(), False
            except EOFError:
                process.join()
                answer, broken = f"its process ended with status {process.exitcode}", True
            if name is not None:
                ended[name] = answer, round(time.monotonic() - began, 2)
                broken = broken or re.search(r"CUDA error|Triton Error \[CUDA\]", answer or "") is not None
                report(ended, len(waiting or ()) + sum(name is not None for _, name, _ in pool.values()))
            elif waiting is None and not broken:
                waiting = deque(answer[::every])
            if broken:
                process.kill()
                replaced += 1
                if waiting and replaced < 20:
                    start()
            elif waiting:
                pool[pipe] = process, waiting.popleft(), time.monotonic()
                pipe.send(pool[pipe][1])
            else:
                pipe.send(None)


def kernels(record: Record, options: argparse.Namespace) -> None:
    """Every Triton kernel against float64, by many processes: nearly all the time goes into compiling, which later parts then need not.

    On CPU in Triton's interpreter.
    """
    if importlib.util.find_spec("triton") is None:
        raise Skip("triton is not installed")
    if not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"
    tiny = options.size == "tiny"
    record.judge(False, "no process could start, see log.txt")

    def report(ended: dict[str, tuple[str | None, float]], left: int) -> None:
        failed = {name: why for name, (why, _) in ended.items() if why is not None}
        rows = [{"check": name, "why": why.strip().splitlines()[-1][:160]} for name, why in failed.items()]
        slowest = sorted(((seconds, name) for name, (_, seconds) in ended.items()), reverse=True)[:10]
        headline = {"passed": len(ended) - len(failed), "failed": len(failed), "not run": left}
        record.update(headline=headline, table=rows[:30], failures=failed, slowest=slowest, names=list(ended))
        record.judge(not failed and not left, f"{len(failed)} checks failed, {left} were not run")

    processes = 1 if tiny else max(1, min(14, (os.cpu_count() or 1) - 2))
    check_all("moetrain.testing.kernel_cases", processes, 12 if tiny else 1, report)


def correctness(record: Record, options: argparse.Namespace) -> None:
    """A small model's loss and gradient norm on the device against float64 on the CPU.

    In bfloat16 only the loss is compared: choices near a tie may differ, which moves the norm.
    """
    from gpu_model import DeepSeekMoEConfig, place, random_batch, step

    config = DeepSeekMoEConfig(hidden_size=64, num_layers=3, num_heads=2, head_dim=32, num_experts=8, top_k=2, expert_width=64,
                               shared_width=64, dense_width=128, init_std=0.1)  # fmt: skip
    batches = [random_batch(4, 64, 256)]
    exact = place(config, torch.float64, torch.device("cpu"), 256)[0]
    reference = step(exact, batches)
    rows: list[dict[str, Any]] = []
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        placed = place(config, dtype, DEVICE, 256)[0]
        with torch.no_grad():  # initialisation in another dtype draws other numbers
            for (_, parameter), (_, source) in zip(placed.parameters(), exact.parameters(), strict=True):
                parameter.copy_(source)
        found = step(placed, batches)
        compared = 1 if dtype == torch.bfloat16 else 2
        error = max(abs(a - b) / abs(b) for a, b in zip(found[:compared], reference, strict=False))
        rows.append({"dtype": str(dtype), "loss": found[0], "norm": found[1], "error": error, "allowed": tolerance})
        record.update(reference=reference, table=rows)
    record.judge(all(row["error"] <= row["allowed"] for row in rows), "an error is larger than allowed")


def layer(record: Record, options: argparse.Namespace) -> None:
    """One MoE layer in bfloat16 by every implementation that is there, forward alone and forward and backward.

    Same weights and inputs, results compared with float64 before anything is timed, interleaved rounds, each time next to that of the
    layer's bare products. All in this process: as many copies of the weights as there are implementations fit on the GPU.
    """
    from moetrain.testing.layer_bench import LayerCase

    dense, _ = machine_rates(options.size)
    tiny = options.size == "tiny"
    rows: list[dict[str, Any]] = []
    record.update(dense_flops_per_second=dense, about="Times are medians; limit: the same products, one expert after the other; share: of "
                  f"{dense / 1e12:.1f} TFLOP/s, a large dense product measured in the same process.")  # fmt: skip
    for routing, shape in itertools.product(("balanced", "zipf:1.2"), TINY_SHAPES if tiny else LAYER_SHAPES):
        case = LayerCase(*shape, precision="bfloat16", routing=routing)
        rows += measure_layers(case, dense, rounds=2 if tiny else 9)
        own = {f"{row['shape']} {row['routing']}": row["share, both"] for row in rows if row["system"] == "moetrain"}
        record.update(table=rows, headline=own)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    record.judge(all(row["failed"] is None for row in rows if row["system"] == "moetrain"), "see the table")


def measure_layers(case: Any, dense: float, rounds: int) -> list[dict[str, Any]]:
    """A row of each implementation for one LayerCase; ``failed`` says why one has no times."""
    from peers.worker import load_adapter

    from moetrain.testing.layer_bench import (
        DenseLimit,
        Unsupported,
        cast_inputs,
        expected_results,
        interleave,
        make_inputs,
        peak_bytes,
        time_step,
        worst_error,
    )

    inputs = make_inputs(case, DEVICE)
    expected = {name: t.float() for name, t in expected_results(inputs, case.top_k).items()}
    columns = ("forward ms", "forward / limit", "share, forward", "both ms", "both / limit", "share, both", "peak MB", "error / allowed")
    rows: dict[str, dict[str, Any]] = {}
    layers: dict[str, Any] = {}
    for name in SYSTEMS:
        row: dict[str, Any] = {"system": name, "shape": ",".join(map(str, case.shape)), "routing": case.routing}
        rows[name] = row | dict.fromkeys(columns) | {"failed": None}
        try:
            built = load_adapter(name).build(case, cast_inputs(inputs, case, DEVICE), "")
            built.prepare()
            built.step()
            error, worst = worst_error(built.results(), expected, case)
            rows[name]["error / allowed"] = error
            if error > 1:
                raise ArithmeticError(f"wrong: {worst}")
            rows[name]["peak MB"] = peak_bytes(built, DEVICE) / 1e6
            built.prepare()
            layers[name] = built
        except Exception as failure:  # of an implementation that is not there, or does not work here
            rows[name]["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:160]
            if not isinstance(failure, (ModuleNotFoundError, Unsupported)):
                traceback.print_exc()
    del expected
    if CUDA:
        torch.cuda.empty_cache()
    limit = DenseLimit(case, DEVICE)
    tokens, hidden, width, _, top_k = case.shape
    for kind, method, products in (("forward", "forward", 3), ("both", "step", 9)):

        def run(built: Any, method: str = method) -> Any:
            built.prepare()
            found = time_step(getattr(built, method), DEVICE)
            built.prepare()  # the results are not needed
            return found

        flops = 2 * products * tokens * top_k * hidden * width
        runs: dict[str, Any] = {}
        for name in list(layers):
            try:
                run(layers[name]), run(layers[name])
                runs[name] = partial(run, layers[name])
            except Exception as failure:  # out of memory, for example, with all the others beside it
                rows[name]["failed"] = f"{kind}: {type(failure).__name__}: {failure}".splitlines()[0][:160]
                traceback.print_exc()
                del layers[name]
        bare = partial(time_step, getattr(limit, method), DEVICE)
        bare(), bare()
        for name, pairs in interleave(runs, bare, rounds).items():
            seconds = statistics.median(pair.own.wall for pair in pairs)
            rows[name] |= {f"{kind} ms": 1e3 * seconds, f"{kind} / limit": statistics.median(pair.wall for pair in pairs),
                           f"share, {kind}": flops / seconds / dense}  # fmt: skip
    return list(rows.values())


def training(record: Record, options: argparse.Namespace) -> None:
    """Steps of a model of the 1B class: tokens/s, utilisation, peak memory, falling loss."""
    from gpu_model import Run

    from moetrain.train.flops import peak_flops

    run, losses, seconds = Run(options.size), [], []
    for index in range(4 if options.size == "tiny" else 15):
        synchronize()
        start = time.perf_counter()
        result = run.step(index)
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss)
        record.update(losses=losses, step_seconds=seconds)
    rows = {name: int(stats.dispatched.sum()) for name, stats in result.statistics.items()}
    median = statistics.median(seconds[3:])
    rate, peak = run.flops.step(result.tokens, run.batches[0].tokens.shape[1], rows) / median, peak_flops(DEVICE)
    record.update(headline={
        "parameters": run.parameters, "tokens per second": result.tokens / median, "model TFLOP/s": rate / 1e12,
        "model FLOP/s utilisation": rate / peak if peak else None, "first loss": losses[0], "last loss": losses[-1],
        "step seconds": median, "peak GB": torch.cuda.max_memory_allocated() / 1e9 if CUDA else None,
    })  # fmt: skip
    record.judge(losses[-1] < losses[0], "the loss does not fall")


def ops(record: Record, options: argparse.Namespace) -> None:
    """Each Triton kernel alone: time on the device, rates, and shares of the limits of kernel_limits.py and of measured rates."""
    if importlib.util.find_spec("triton") is None:
        raise Skip("triton is not installed")
    if not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"
    from kernel_limits import work

    dense, copy = machine_rates(options.size)
    about = f"""bound: the larger of bytes and FLOPs at data-sheet rates of an H100; reachable: at those measured here,
{dense / 1e12:.1f} TFLOP/s and {copy / 1e12:.2f} TB/s."""
    record.update(dense_flops_per_second=dense, copy_bytes_per_second=copy, about=about)
    rows: list[dict[str, Any]] = []
    for shape in TINY_SHAPES if options.size == "tiny" else LAYER_SHAPES:
        tokens, hidden, width, experts, top_k = shape
        launches = work(tokens, hidden, width, experts, top_k)
        for launch, action in zip(launches, kernel_calls(*shape), strict=True):
            seconds = device_seconds(action, 2 if options.size == "tiny" else 5)
            reachable = max(launch.bytes_moved / copy, launch.flops / dense)
            rows.append({"shape": ",".join(map(str, shape)), "kernel": launch.kernel, "what": launch.what, "ms": 1e3 * seconds,
                         "TFLOP/s": launch.flops / seconds / 1e12, "GB/s": launch.bytes_moved / seconds / 1e9,
                         "share of bound": max(launch.seconds) / seconds, "share of reachable": reachable / seconds})  # fmt: skip
            record.update(table=rows)
        own = [row for row in rows if row["shape"] == rows[-1]["shape"]]
        total = {f"sum of ms, {rows[-1]['shape']}": sum(row["ms"] for row in own)}
        record.update(headline=record.found.get("headline", {}) | total)
    record.judge(True)


def kernel_calls(tokens: int, hidden: int, width: int, experts: int, top_k: int) -> Iterator[Callable[[], Any]]:
    """The launches of kernel_limits.work in its order, on random data, experts evenly loaded up to chance. In the interpreter float16."""
    from moetrain.kernels.triton_ops import grouped_gemm, grouped_outer, router
    from moetrain.kernels.triton_ops.segment_sum import segment_sum
    from moetrain.kernels.triton_ops.sort_experts import sort_by_expert

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16 if CUDA else torch.float16, device=DEVICE) * std

    logits = torch.randn(tokens, experts, device=DEVICE)
    routed = router.forward(logits, top_k, renormalise=True)
    expert = routed.index.flatten()
    order, counts, place = sort_by_expert(expert, experts)
    token, weight = order // top_k, routed.weight.flatten()[order]
    x, grad = normal(tokens, hidden), normal(tokens, hidden)
    w_in, w_out = normal(experts, 2 * width, hidden, std=hidden**-0.5), normal(experts, hidden, width, std=width**-0.5)
    yield lambda: router.forward(logits, top_k, renormalise=True)
    yield lambda: sort_by_expert(expert, experts)
    options: dict[str, Any] = {"source": token, "activation": "silu", "gated": True}
    h, a = grouped_gemm.activation_gemm(x, w_in, counts, **options)
    yield lambda: grouped_gemm.activation_gemm(x, w_in, counts, **options)
    rows = grouped_gemm.grouped_gemm(a, w_out, counts, transposed=True)
    yield lambda: grouped_gemm.grouped_gemm(a, w_out, counts, transposed=True)
    yield lambda: segment_sum(rows, tokens, place=place, bounds=None, weight=weight)
    grad_h, weighted, _ = grouped_gemm.activation_backward_gemm(grad, w_out, h, counts, weight=weight, **options)
    yield lambda: grouped_gemm.activation_backward_gemm(grad, w_out, h, counts, weight=weight, **options)
    yield lambda: grouped_outer.grouped_outer(grad, weighted, counts, left_source=token)
    yield lambda: grouped_outer.grouped_outer(grad_h, x, counts, right_source=token)
    yield lambda: grouped_gemm.grouped_gemm(grad_h, w_in, counts, transposed=False)
    yield lambda: segment_sum(rows, tokens, place=place, bounds=None)


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Where the host waits for the GPU while the context is entered: the project's innermost frames, and how often."""
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(f"{PACKAGE}/")]
            short = [f"{frame.filename.removeprefix(f'{PACKAGE}/')}:{frame.lineno} {frame.name}" for frame in frames[-4:]]
            found[" < ".join(reversed(short)) or "no frame of moetrain"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")  # "error" would show the first alone
        try:
            yield found
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")


def synchronisation(record: Record, options: argparse.Namespace) -> None:
    """Between the start of a forward and the end of its backward the host never waits; what does in the rest of a step is listed."""
    from gpu_model import Run, count_units

    from moetrain.train.step import on_device

    run = Run("tiny")
    totals, _ = count_units(run.batches, run.placed)
    batch, ctx = on_device(run.batches[0], run.placed, training=True, seed=0, step=0, total_steps=2, totals=totals)

    def forward_and_backward() -> None:
        ctx.losses.clear()
        ctx.statistics.clear()
        sums = run.objective(run.placed.model, batch, ctx)
        (sums.main + sum(sums.extra.values()) + sum(ctx.losses.values())).backward()

    for _ in range(2):  # kernels are compiled and chosen, memory is allocated
        forward_and_backward()
        run.step(0)
    synchronize()
    with waits() as within:
        forward_and_backward()
    with waits() as elsewhere:
        run.step(1)
    rows = [{"where": where, "times": times, "in": part} for part, found in (("forward and backward", within), ("a whole step", elsewhere))
            for where, times in found.items()]  # fmt: skip
    record.update(headline={"waits in forward and backward": sum(within.values()), "waits in a step": sum(elsewhere.values())}, table=rows)
    if not CUDA:
        raise Skip("needs CUDA: it ran, but nothing can wait")
    record.judge(not within, f"{sum(within.values())} waits in forward and backward")


def profiled(record: Record, options: argparse.Namespace) -> None:
    """A trace of two steps of training, which opens in Perfetto, and the time by kernel."""
    from gpu_model import Run

    run, steps = Run(options.size), 2
    for index in range(3):
        run.step(index)

    def trace(*activities: ProfilerActivity) -> tuple[list[Any], float, int]:
        synchronize()
        start = time.perf_counter()
        with profile(activities=activities) as profiler:
            for index in range(3, 3 + steps):
                run.step(index)
            synchronize()
            seconds = time.perf_counter() - start
        target = options.out / "trace.json.gz"
        profiler.export_chrome_trace(str(target))
        return list(profiler.key_averages()), seconds, target.stat().st_size

    events, seconds, size = trace(ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else []))
    if CUDA and size > TRACE_BYTES:
        size = trace(ProfilerActivity.CUDA)[2]
    device = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    field = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events_here = [e for e in events if e.device_type == device and not getattr(e, "is_user_annotation", False)]
    total = sum(getattr(event, field) for event in events_here)
    top = sorted(events_here, key=lambda event: -getattr(event, field))[:25]
    rows = [{"kernel": e.key[:90], "calls per step": e.count / steps, "ms per step": getattr(e, field) / steps / 1e3,
             "share": getattr(e, field) / max(total, 1)} for e in top]  # fmt: skip
    waiting = {e.key: e.count / steps for e in events if "Synchronize" in e.key}
    record.update(table=rows, waits_per_step=waiting, headline={
        "step ms, profiled": 1e3 * seconds / steps, "device ms per step": total / steps / 1e3, "trace bytes": size
    })  # fmt: skip
    record.judge(bool(rows), "nothing was recorded")


def tests(record: Record, options: argparse.Namespace) -> None:
    """``pytest -m gpu`` on the files that have such tests: others may need packages that are not here."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "unit").rglob("test_*.py") if "mark.gpu" in file.read_text())
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-rf", *files]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plug-ins of other packages are not needed
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout[-500:])}
    record.update(headline=counts, files=files, output=(done.stdout + done.stderr)[-4000:])
    if done.returncode in (0, 5) and not counts.get("passed"):
        raise Skip("no test ran" if CUDA else "needs CUDA")
    record.judge(done.returncode == 0, f"pytest ended with status {done.returncode}")


PARTS: dict[str, Callable[[Record, argparse.Namespace], None]] = {
    "kernels": kernels, "correctness": correctness, "layer": layer, "training": training, "ops": ops,
    "synchronisation": synchronisation, "profile": profiled, "tests": tests,
}  # fmt: skip


def main() -> None:
    """Run one part; what goes wrong is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    options = parser.parse_args()
    record = Record(options.record)
    try:
        PARTS[options.part](record, options)
    except Skip as reason:
        record.update(status="skipped", reason=str(reason))
    except Exception as failure:
        traceback.print_exc()
        record.update(status="failed", reason=f"{type(failure).__name__}: {failure}"[:500], traceback=traceback.format_exc())


if __name__ == "__main__":
    main()
