"""Run folders: their names, what is written into them before training, and what may change when a run goes on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import xxhash

from moetrain.config import dump
from moetrain.errors import CheckpointError, ConfigError, Problem
from moetrain.storage import replace, storage_errors
from moetrain.train.settings import Config

MAY_CHANGE = (
    "run", "launch", "parallel", "logging", "metrics", "checkpoint", "schedule", "optim.lr", "data.path", "train.steps", "train.recompute",
    "train.micro_batch_size", "train.threads", "train.keep_freed_memory", "train.device", "train.max_skipped_steps",
)  # fmt: skip
"""Dotted names that a continued run may change: they alter speed, length or learning rate, not what is learnt from what.
The data may lie elsewhere, but must be the same: its content hash is in the checkpoint."""

NOT_IN_NAME = ("run", "checkpoint", "logging", "metrics")


def config_hash(config: Config) -> str:
    """Hash of what distinguishes runs, 8 hexadecimal digits."""
    plain = {name: value for name, value in dump(config).items() if name not in NOT_IN_NAME}
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())[:8]


def resolve_run_dir(config: Config) -> Path:
    """The folder of this run: the same command gets the same folder, and so continues.

    With checkpoint.resume=never a derived name gets a number if it is taken, and an explicit run.dir must not hold a run.
    """
    folder = (
        Path(config.run.dir)
        if config.run.dir
        else Path(config.run.root) / (config.run.name or f"{config.model.kind}-{config_hash(config)}")
    )
    folder = folder.expanduser()
    if config.checkpoint.resume != "never" or not (folder / "config.yaml").exists():
        return folder
    if config.run.dir or config.run.name:
        field = "run.dir" if config.run.dir else "run.name"
        expected = "holds a run already; choose another or checkpoint.resume=auto"
        raise ConfigError([Problem(field, str(folder), expected)])
    number = 2
    while (numbered := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return numbered


def check_resume(config: Config, run_dir: Path) -> None:
    """checkpoint.resume must be auto, never, or a run or checkpoint folder; run.dir must not be something else."""
    resume = config.checkpoint.resume
    if resume not in ("auto", "never"):
        folder = Path(resume).expanduser()
        if not (folder / "manifest.json").exists() and not any((folder / "checkpoints").glob("step-*/manifest.json")):
            raise CheckpointError(f"checkpoint.resume = {resume!r}: must be auto, never, or a folder of a run or checkpoint that exists")
        check_compatible(config, folder.resolve().parent.parent if (folder / "manifest.json").exists() else folder)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError([Problem("run.dir", str(run_dir), "must be a folder")])


def check_compatible(config: Config, run_dir: Path) -> list[tuple[str, Any, Any]]:
    """Differences from the configuration that a run folder was made with: (dotted name, old, new), all of them allowed.

    Raises ConfigError listing those that are not, CheckpointError if the folder's config.yaml cannot be read.
    """
    file = run_dir / "config.yaml"
    if not file.exists():
        return []
    import yaml

    try:
        made_with = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(made_with, dict):
        raise CheckpointError(f"{file} is not the configuration of a run")
    changes = list(differences(made_with, dump(config)))
    refused = [change for change in changes if not any(change[0] == name or change[0].startswith(name + ".") for name in MAY_CHANGE)]
    if refused:
        raise ConfigError(
            [Problem(name, new, f"the run in {run_dir} has {old!r}, which cannot change; start another run") for name, old, new in refused]
        )
    return changes


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of all leaves that differ."""
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def open_run(config: Config, run_dir: Path) -> None:
    """Write config.yaml and environment.json, or record what changed in a run that goes on."""
    import yaml

    changes = [change for change in check_compatible(config, run_dir) if not change[0].startswith("run.")]
    with storage_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        if changes:
            with (run_dir / "config_changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps([{"field": name, "old": old, "new": new} for name, old, new in changes]) + "\n")
        replace(run_dir / "config.yaml", yaml.safe_dump(dump(config), sort_keys=False))
        replace(run_dir / "environment.json", json.dumps(environment(), indent=1))


def environment() -> dict[str, Any]:
    """What a run depends on besides its configuration."""
    import torch

    packages = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "packages": dict(sorted(packages.items())),
    }


def _git_commit() -> str | None:
    """The commit of moetrain's own checkout; None if it is installed, even inside another project's checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True, timeout=10)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
