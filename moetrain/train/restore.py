"""Opening a run folder: its configuration, and its model in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config import load
from moetrain.errors import CheckpointError
from moetrain.parallel.layouts import Layout
from moetrain.parallel.parallelize import ParallelModel, parallelize
from moetrain.parallel.ranks import Ranks
from moetrain.train import checkpoint
from moetrain.train.events import has_one_expert
from moetrain.train.run import build_model
from moetrain.train.settings import Config
from moetrain.train.state import model_tensors


def read_config(run_dir: Path, router: Mapping[str, Any] | None = None) -> Config:
    """The configuration that a run folder was made with. router: its settings to be replaced."""
    import yaml

    import moetrain.components  # noqa: F401  the registry must know the kinds in the file

    path = run_dir / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{run_dir} is not a run folder: it has no config.yaml")
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    return load(Config, {**plain, "router": {**plain["router"], **(router or {})}})


@dataclass
class RestoredRun:
    """A run's model with the weights of one checkpoint, on this process alone."""

    config: Config
    run_dir: Path
    checkpoint: Path
    placed: ParallelModel


def restore(run: str, *, device: str = "auto", router: Mapping[str, Any] | None = None) -> RestoredRun:
    """run: a run folder (its newest good checkpoint is taken) or a checkpoint folder. router: settings of the router that
    replace the run's.

    Raises CheckpointError if it is neither, ConfigError if the settings do not fit.
    """
    folder = Path(run).expanduser()
    path: Path | None = folder
    if (folder / "manifest.json").exists():
        folder = folder.resolve().parent.parent
    else:
        path = checkpoint.newest_good(folder / "checkpoints")
    config = read_config(folder, router)
    if path is None:
        raise CheckpointError(f"run {str(folder)!r} holds no complete checkpoint")
    stored = checkpoint.read_info(path)
    one_expert = has_one_expert(config, stored.info.get("events", []))
    model = build_model(config, stored.shapes["model.embed"][0], one_expert=one_expert)
    placed = parallelize(model, Layout("single", 1, 1), Ranks(), device=Ranks().device(device))
    checkpoint.load(path, model_tensors(placed))
    placed.model.eval()
    return RestoredRun(config, folder, path, placed)
