"""The ``moetrain`` command. Light at import: worker processes import it again."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from moetrain.errors import ConfigError, MoetrainError, Problem

ARXIV_ID = re.compile(r"\d{4}\.\d{5}")

OVERVIEW = """\
moetrain: trains sparse Mixture-of-Experts models

  moetrain train [overrides]        train, or continue a run; --help shows every setting, -m sweeps
  moetrain prepare [overrides]      tokenise and pack the data ahead of time
  moetrain evaluate run=DIR         held-out loss and perplexity of a run
  moetrain generate run=DIR prompt="def "
  moetrain plan run=DIR [settings]  what each expert placement would cost on a described cluster; or with overrides
                                    instead of a run: moetrain plan model=deepseek_moe_16b cluster=h100
  moetrain bench profile            measure this machine's collectives and expert computation for planning
  moetrain bench layer [settings]   time one MoE layer of any size against its bare matrix products
  moetrain bench ops [settings]     time each hot operation against its slow twin
  moetrain bench step [overrides]   time training steps of a configuration on one rank, phase by phase
  moetrain list [GROUP [NAME]]      what can be chosen: routers, losses, models, ...; the settings of one
  moetrain --version

On several ranks: moetrain train launch.nproc_per_node=4 parallel=ep
or torchrun --nproc-per-node 4 -m moetrain.launch.train [overrides]

Exit codes: 0 done, 2 bad configuration, data or checkpoint, 3 storage, 4 training diverged, 5 a rank is lost,
130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM (a checkpoint was written), 1 anything else.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # before torch is imported: OpenMP threads that wait by spinning slow each other down several times over as soon
    # as the machine has anything else to do
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports its own start and stop, on every rank
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if command == "--version":
        from moetrain import __version__

        print(f"moetrain {__version__}")
        return 0
    if command in ("help", "--help", "-h"):
        print(OVERVIEW)
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "prepare": prepare,
        "evaluate": evaluate,
        "generate": generate,
        "plan": plan,
        "bench": bench,
        "list": list_components,
    }
    if command not in commands:
        print(f"moetrain: no command {command!r}\n\n{OVERVIEW}", file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except MoetrainError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `moetrain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def report(error: MoetrainError) -> None:
    """Print an error once on each machine, whatever the number of ranks that found it."""
    from moetrain.parallel.ranks import Ranks

    if Ranks.detect().local_rank == 0:
        print(f"moetrain: error: {error}", file=sys.stderr, flush=True)


def train(arguments: list[str]) -> int:
    """moetrain train."""
    from moetrain.launch.compose import run_application

    def job(plain: dict[str, Any]) -> None:
        from moetrain.launch.local import train as start
        from moetrain.parallel.ranks import Ranks

        result = start(plain)
        main_rank = Ranks.detect().is_main
        if result["status"] == "interrupted":
            if main_rank:
                print(f"stopped after step {result['step']}; the same command continues it. Run folder: {result['run_dir']}", flush=True)
            sys.exit(128 + result["signal"])
        if main_rank:
            show_result(result, plain["logging"]["sample_prompt"])

    run_application(arguments, job)
    return 0


def show_result(result: dict[str, Any], prompt: str | None) -> None:
    """The end of a finished run: held-out loss, a sample of text, the run folder."""
    import torch

    print(f"done: {result['step']} steps" + (f", held-out loss {result['eval_loss']:.4f}" if "eval_loss" in result else ""))
    print(f"run folder: {result['run_dir']}", flush=True)
    if prompt:
        from moetrain.inference.generate import GenerateSettings
        from moetrain.inference.generate import main as sample

        try:
            written = sample(GenerateSettings(run=result["run_dir"], prompt=prompt))
        except (MoetrainError, torch.OutOfMemoryError) as error:  # the run itself is complete
            print(f"no sample (logging.sample_prompt): {error}", file=sys.stderr)
        else:
            print(f"sample:\n{written['prompt']}{written['text']}", flush=True)


def prepare(arguments: list[str]) -> int:
    """moetrain prepare."""
    from moetrain.launch.compose import run_application

    def job(plain: dict[str, Any]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from moetrain.data import prepare as run
        from moetrain.launch.compose import build_config

        config = build_config(plain)
        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("reading", total=None)
            data = run(config.data, progress=lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total))
        print(data.folder)
        for title, split in (("train", data.meta["train"]), ("held out", data.meta["evaluation"])):
            print(f"{title}: {split['tokens']:,} tokens in {split['documents']:,} documents")
        print(f"vocabulary: {data.vocab_size}")

    run_application(arguments, job)
    return 0


def keyword_settings(cls: type, arguments: list[str]) -> Any:
    """A settings dataclass from ``key=value`` arguments; values are read as YAML, texts may hold anything."""
    import yaml

    import moetrain.components  # noqa: F401
    from moetrain.config import describe, load

    values: dict[str, Any] = {}
    described = describe(cls)
    lines = "\n".join(f"  {s.name}={'' if s.default == '???' else s.default}   {s.doc}" for s in described)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in ("--help", "-h"):
            print(f"{cls.__doc__}\n\nArguments are key=value:\n{lines}")
            sys.exit(0)
        if not equals:
            raise ConfigError(f"arguments are key=value; {argument!r} is not. Keys:\n{lines}")
        texts = [s.name for s in described if s.name in ("prompt", "run", "device", "trace", "json", "out")]
        outer, _, name = key.rpartition(".")
        section = values.setdefault(outer, {}) if outer else values
        if not isinstance(section, dict):
            raise ConfigError([Problem(outer, section, "must be a mapping of settings")])
        try:
            section[name] = value if key in texts else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{argument}: the value is not valid YAML") from error
    return load(cls, values)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A command's own settings, and overrides of a training configuration: dotted names, groups, what starts with + or ~."""
    import moetrain.components  # noqa: F401
    from moetrain import registry

    groups = (*registry.groups(), "experiment")

    def is_override(argument: str) -> bool:
        name = argument.partition("=")[0]
        return name[:1] in ("+", "~") or "." in name or name in groups

    return [a for a in arguments if not is_override(a)], [a for a in arguments if is_override(a)]


def evaluate(arguments: list[str]) -> int:
    """moetrain evaluate."""
    from moetrain.train.evaluate import EvaluateSettings
    from moetrain.train.evaluate import main as run

    result = run(keyword_settings(EvaluateSettings, arguments))
    print(f"loss {result['loss']!r}  perplexity {result['perplexity']:.4f}  tokens {result['tokens']}  checkpoint {result['checkpoint']}")
    return 0


def generate(arguments: list[str]) -> int:
    """moetrain generate."""
    from moetrain.inference.generate import GenerateSettings
    from moetrain.inference.generate import main as run

    result = run(keyword_settings(GenerateSettings, arguments))
    print(result["prompt"] + result["text"])
    return 0


def plan(arguments: list[str]) -> int:
    """moetrain plan."""
    from moetrain.config import load
    from moetrain.launch.compose import run_application
    from moetrain.simulate.plan import PlanSettings
    from moetrain.simulate.plan import main as run
    from moetrain.train.restore import read_config
    from moetrain.train.settings import Config

    own, overrides = split_overrides(arguments)
    settings = keyword_settings(PlanSettings, own)

    def compare(config: Config) -> None:
        report = run(settings, config)
        report.show()
        if settings.json is not None:
            report.save(Path(settings.json).expanduser())

    if settings.run is None:
        run_application(overrides, lambda plain: compare(load(Config, plain)))
    elif overrides:
        raise ConfigError([Problem("run", settings.run, f"has its own configuration; leave out {' '.join(overrides)}")])
    else:
        compare(read_config(Path(settings.run).expanduser()))
    return 0


def bench(arguments: list[str]) -> int:
    """moetrain bench."""
    benchmarks: dict[str, Callable[[list[str]], int]] = {
        "profile": bench_profile,
        "layer": bench_layer,
        "ops": bench_ops,
        "step": bench_step,
    }
    name, rest = (arguments[0], arguments[1:]) if arguments else (None, [])
    if name not in benchmarks:
        raise ConfigError(f"moetrain bench {name or ''}: must be one of: {', '.join(benchmarks)}")
    return benchmarks[name](rest)


def bench_profile(arguments: list[str]) -> int:
    """moetrain bench profile: measure, show and keep the machine's linear costs."""
    from rich.console import Console
    from rich.table import Table

    from moetrain.launch.bench import ProfileSettings, profile
    from moetrain.parallel.ranks import Ranks

    measured = profile(keyword_settings(ProfileSettings, arguments))
    if not Ranks.detect().is_main:
        return 0
    machine = measured.machine
    table = Table(
        title=f"{machine.device}, {machine.num_nodes} x {machine.ranks_per_node} ranks, {machine.backend}", box=None, padding=(0, 2)
    )
    for column in ("operation", "alpha ms", "beta", "R^2"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for link, costs in (("within a node", measured.intra), ("between nodes", measured.inter)):
        for name, cost in costs.items():
            table.add_row(f"{name} {link}", f"{1e3 * cost.alpha:.4f}", f"{1e9 * cost.beta:.4f} ns/byte", f"{cost.r_squared:.4f}")
    cost = measured.experts
    table.add_row(f"{measured.num_experts} experts", f"{1e3 * cost.alpha:.4f}", f"{1e12 * cost.beta:.4f} ps/FLOP", f"{cost.r_squared:.4f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table, highlight=False)
    print(measured.save())
    return 0


def bench_layer(arguments: list[str]) -> int:
    """moetrain bench layer: one layer's time over that of its matrix products."""
    import statistics

    from moetrain.launch.bench import LayerSettings, layer
    from moetrain.testing.layer_bench import spread

    settings = keyword_settings(LayerSettings, arguments)
    measured = layer(settings)
    pairs = measured.pairs
    limit = statistics.median(pair.limit.wall for pair in pairs)
    flops = 18 * settings.tokens * settings.top_k * settings.hidden * settings.width  # nine products of 2 R D F
    print(f"layer, forward and backward   {spread([1e3 * pair.own.wall for pair in pairs], 1)} ms")
    print(f"its matrix products           {spread([1e3 * pair.limit.wall for pair in pairs], 1)} ms, {flops / limit / 1e9:.0f} GFLOP/s")
    print(f"layer / products, wall time   {spread([pair.wall for pair in pairs])}")
    print(f"layer / products, CPU time    {spread([pair.cpu for pair in pairs])}")
    print(f"copy of the rows it moves     {1e3 * measured.copy_seconds:.1f} ms")
    print(f"peak memory of a step         {measured.peak_bytes / 1e6:.0f} MB above weights and inputs")
    print(f"largest error                 {measured.error:.2f} of what {settings.precision} is allowed")
    print(f"medians (minimum-maximum) of {settings.rounds} rounds")
    return 0 if measured.error <= 1 else 1


def bench_ops(arguments: list[str]) -> int:
    """moetrain bench ops: each operation's time and that of its slow twin."""
    import statistics

    from rich.console import Console
    from rich.table import Table

    from moetrain.launch.bench import OpsSettings, ops
    from moetrain.testing.layer_bench import spread

    settings = keyword_settings(OpsSettings, arguments)
    table = Table(box=None, padding=(0, 2))
    for column in ("operation", "forward ms", "backward ms", "slow twin / fast", "GB/s", "GFLOP/s", "error"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    worst = 0.0
    for speed in ops(settings):
        seconds = statistics.median(p.total for p in speed.fast)
        table.add_row(
            speed.name,
            spread([1e3 * p.forward for p in speed.fast]),
            spread([1e3 * p.backward for p in speed.fast]) if any(p.backward for p in speed.fast) else "",
            spread([slow.total / fast.total for slow, fast in zip(speed.slow, speed.fast, strict=True)]),
            f"{speed.bytes / seconds / 1e9:.2f}",
            f"{speed.flops / seconds / 1e9:.1f}" if speed.flops else "",
            f"{speed.error:.3f}",
        )
        worst = max(worst, speed.error)
    Console(width=None if sys.stdout.isatty() else 160).print(table, highlight=False)
    print(f"medians (minimum-maximum) of {settings.rounds} rounds; slow twin / fast, GB/s and GFLOP/s: of forward and backward together")
    print("GB/s: each operand read and each result written once per pass, which no implementation can avoid")
    print(f"error: largest, of outputs and gradients, in units of what {settings.dtype} is allowed against the twin in float64")
    return 0 if worst <= 1 else 1


def bench_step(arguments: list[str]) -> int:
    """moetrain bench step: speed of training steps and where their time goes."""
    from moetrain.launch.bench import StepSettings, step
    from moetrain.launch.compose import run_application
    from moetrain.testing.layer_bench import spread

    own, overrides = split_overrides(arguments)
    settings = keyword_settings(StepSettings, own)

    def job(plain: dict[str, Any]) -> None:
        speed = step(settings, plain)
        lines = speed.lines
        print(
            f"step              {spread([1e3 * line['step_seconds'] for line in lines], 1)} ms, {lines[0]['tokens']} tokens, {speed.device}"
        )
        print(f"tokens/s          {spread([line['tokens_per_second'] for line in lines], 0)}")
        print(f"model GFLOP/s     {spread([line['model_flops_per_second'] / 1e9 for line in lines], 1)}")
        if "model_flops_utilisation" in lines[0]:
            print(f"of the device     {spread([100 * line['model_flops_utilisation'] for line in lines], 1)} %")
        for phase in lines[-1]["seconds"]:
            print(f"  {phase:<15} {spread([1e3 * line['seconds'].get(phase, 0.0) for line in lines], 1)} ms")
        if speed.peak_bytes is not None:
            print(f"peak memory       {speed.peak_bytes / 1e6:.0f} MB, {'tensors' if speed.device == 'cuda' else 'of the process'}")
        print(f"medians (minimum-maximum) of {settings.steps} steps after {settings.warm_up}")

    run_application(overrides, job)
    return 0


def list_components(arguments: list[str]) -> int:
    """moetrain list: names, what they are, where they are from."""
    from rich.console import Console
    from rich.table import Table

    import moetrain.components  # noqa: F401
    from moetrain import registry
    from moetrain.launch.compose import shipped

    groups = [*registry.groups(), "experiment"]
    wanted = groups
    if arguments:
        irregular = {"losses": "loss", "capacities": "capacity", "expert": "experts"}
        singular = {**{g: g for g in groups}, **{f"{g}s": g for g in groups}, **irregular}
        if arguments[0] not in singular:
            raise ConfigError(f"no group {arguments[0]!r}; groups: {', '.join(groups)}")
        wanted = [singular[arguments[0]]]
    if len(arguments) == 2:
        return describe_component(wanted[0], arguments[1])
    console = Console(width=None if sys.stdout.isatty() else 160)
    for group in wanted:
        table = Table(title=group, title_justify="left", box=None, padding=(0, 2))
        for column in ("name", "what it is", "source"):
            table.add_column(column, overflow="fold")
        for name, component in registry.components(group).items():
            table.add_row(name, (component.__doc__ or "").strip().splitlines()[0], getattr(component, "source", ""))
        for name in shipped(group):
            if name not in registry.components(group):
                comment = preset_comment(group, name)
                table.add_row(name, comment, ", ".join(ARXIV_ID.findall(comment)) or "preset")
        console.print(table, highlight=False)
        console.print()
        if group == "schedule":
            list_courses(console)
    return 0


def list_courses(console: Any) -> None:
    """The settings of routers and other parts that follow a course over training steps."""
    from rich.table import Table

    from moetrain import registry

    rows: dict[tuple[str, str, str], list[str]] = {}
    for group in registry.groups():
        for name, component in registry.components(group).items():
            for path, field in nested_fields(component):
                if field.metadata.get("schedule"):
                    rows.setdefault((f"{group}.{path}", field.metadata["doc"], field.metadata["schedule"]), []).append(name)
    table = Table(title="schedules of routing: settings of other parts", title_justify="left", box=None, padding=(0, 2))
    for column in ("setting", "what it is", "of", "source"):
        table.add_column(column, overflow="fold")
    for (setting, doc, source), names in rows.items():
        table.add_row(setting, doc, ", ".join(names), source)
    console.print(table, highlight=False)
    console.print()


def nested_fields(component: type) -> Iterator[tuple[str, Field[Any]]]:
    """Dotted name and field of a configuration's settings, those of sections in it included."""
    for field in fields(component):
        yield field.name, field
        if isinstance(field.default_factory, type) and is_dataclass(field.default_factory):
            for path, inner in nested_fields(field.default_factory):
                yield f"{field.name}.{path}", inner


def describe_component(group: str, name: str) -> int:
    """moetrain list GROUP NAME: the settings of one component with their defaults, or a preset's file."""
    from importlib import resources

    import moetrain.components  # noqa: F401
    from moetrain import registry
    from moetrain.config import describe
    from moetrain.launch.compose import shipped

    if name in shipped(group) and name not in registry.components(group):
        print((resources.files("moetrain.configs") / group / f"{name}.yaml").read_text(encoding="utf-8"))
        return 0
    component = registry.lookup(group, name)
    print(f"{group}={name}: {(component.__doc__ or '').strip()}\n")
    for setting in describe(component):
        print(f"  {setting.name} = {setting.default}\n      {setting.doc}")
    return 0


def preset_comment(group: str, name: str) -> str:
    """The first comment of a YAML preset."""
    from importlib import resources

    text = (resources.files("moetrain.configs") / group / f"{name}.yaml").read_text(encoding="utf-8")
    comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    return comments[0] if comments else ""
