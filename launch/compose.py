"""Hydra: fills its ConfigStore from the registry, runs a command as a Hydra application, turns its errors into ours."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from string import Template
from typing import Any

import torch

from moetrain import registry
from moetrain.config import defaults, load, unknown
from moetrain.errors import ConfigError, MoetrainError, Problem
from moetrain.train.settings import Config

SECTIONS = ("run", "train", "checkpoint", "metrics", "logging", "launch")
DICTIONARIES = ("loss", "dropout")
"""Groups of which a run has any number of components, by name."""


class SweepError(MoetrainError):
    """Several jobs of a sweep failed; the exit code is the first one's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


HYDRA_ONLY = ("object_type", "reference_type", "See https", "Set the env", "Config search path", "provider=", "To append to your config")
"""Beginnings of lines in Hydra's messages that say nothing to the user of this command: a key added with + is refused too."""


def shipped(group: str) -> list[str]:
    """Names of the YAML options of a group."""
    folder = resources.files("moetrain.configs") / group
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")) if folder.is_dir() else []


def fill_config_store() -> None:
    """Copy the registry into Hydra's ConfigStore; a YAML option of the same name wins."""
    import typing

    from hydra.core.config_store import ConfigStore

    import moetrain.components  # noqa: F401  importing registers

    store = ConfigStore.instance()
    hints = typing.get_type_hints(Config)
    store.store(name="sections", node={section: defaults(hints[section]) for section in SECTIONS})
    for group in registry.groups():
        for name, component in registry.components(group).items():
            if name not in shipped(group):
                package = f"{group}.{name}" if group in DICTIONARIES else group
                store.store(group=group, name=name, node=defaults(component), package=package)


def build_config(plain: dict[str, Any]) -> Config:
    """The typed configuration. Raises ConfigError listing every problem, also those that depend on the number of ranks."""
    from moetrain.parallel.ranks import Ranks

    config = load(Config, plain)
    launched = Ranks.detect().world_size if "RANK" in os.environ else config.launch.nproc_per_node * config.launch.nnodes
    problems = list(config.layout_problems(launched))
    local, gpus = Ranks.detect().local_world_size if "RANK" in os.environ else config.launch.nproc_per_node, torch.cuda.device_count()
    if config.train.device == "cuda" and not gpus:
        problems.append(Problem("train.device", "cuda", "needs a GPU that torch can use; this machine has none"))
    elif config.train.device != "cpu" and gpus and local > gpus:
        problems.append(Problem("launch.nproc_per_node", local, f"must be <= the {gpus} GPUs of this machine, or train.device=cpu"))
    if problems:
        raise ConfigError(problems)
    return config


def compose(*overrides: str) -> dict[str, Any]:
    """The resolved plain configuration of a command line, for programs: nothing is run.

    Raises ConfigError for whatever Hydra or OmegaConf refuse.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(_composed(overrides), resolve=True)
    except OmegaConfBaseException as error:
        raise _refusal(error) from error
    return {"loss": {}, **plain}  # type: ignore[dict-item]


def help_text(overrides: Sequence[str]) -> str:
    """What --help prints with these overrides. Hydra's own help fills the same template, but takes seconds to list the groups.

    Raises ConfigError for whatever Hydra or OmegaConf refuse.
    """
    from omegaconf import OmegaConf

    composed = _composed(overrides, return_hydra_config=True)
    options = {group: sorted({*registry.components(group), *shipped(group)}) for group in (*registry.groups(), "experiment")}
    groups = "\n".join(f"{group}: {', '.join(names)}" for group, names in sorted(options.items()))
    config = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    return Template(composed.hydra.help.template).substitute(APP_CONFIG_GROUPS=groups, CONFIG=OmegaConf.to_yaml(config))


def _composed(overrides: Sequence[str], **settings: Any) -> Any:
    """The unresolved DictConfig of a command line. settings: of ``hydra.compose``. Raises ConfigError for what Hydra refuses."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    fill_config_store()
    try:
        with hydra.initialize_config_module("moetrain.configs", version_base="1.3"):
            return hydra.compose("config", overrides=list(overrides), **settings)
    except (HydraException, OmegaConfBaseException) as error:
        raise _refusal(error) from error


def run_application(arguments: list[str], job: Callable[[dict[str, Any]], None]) -> None:
    """Run ``job(resolved plain configuration)`` under Hydra with these command-line arguments (also --help, --cfg, -m).

    Raises ConfigError for whatever Hydra or OmegaConf refuse.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags in (["--help"], ["-h"]):  # beside other flags it is Hydra's
        print(help_text([argument for argument in arguments if argument not in flags]))
        return
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    fill_config_store()
    # Hydra then raises instead of printing its own message and leaving with status 1
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path="pkg://moetrain.configs", config_name="config")
    def main(composed: Any) -> None:
        # kept for later: Hydra would print a line of its own, and the other jobs of a sweep go on
        try:
            try:
                plain = OmegaConf.to_container(composed, resolve=True)
            except OmegaConfBaseException as error:
                raise _refusal(error) from error
            job({"loss": {}, **plain})  # type: ignore[dict-item]
        except MoetrainError as error:
            if HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
                raise  # this process is a job of another launcher, which tells its own process
            failures.append((OmegaConf.to_container(HydraConfig.get().overrides.task), error))

    failures: list[tuple[Any, MoetrainError]] = []
    previous = sys.argv
    # argparse takes overrides on one side of a flag only; -m may stand anywhere
    multirun = [a for a in arguments if a in ("-m", "--multirun")]
    sys.argv = ["moetrain train", *multirun, *(a for a in arguments if a not in multirun)]
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        raise _refusal(error) from error
    except ValueError as error:
        if str(error).startswith("Config group override"):
            raise _refusal(error) from error
        raise
    finally:
        sys.argv = previous
    if len(failures) == 1:
        raise failures[0][1]
    if failures:
        lines = "\n".join(f"  {' '.join(overrides)}: {error}" for overrides, error in failures)
        raise SweepError(f"{len(failures)} jobs of the sweep failed:\n{lines}", failures[0][1].exit_code)


def _refusal(error: Exception) -> ConfigError:
    """An error of Hydra's or OmegaConf's in our words: for a key or an option that is not there, those that are."""
    from hydra.errors import MissingConfigException
    from omegaconf import DictConfig

    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.partition("/")
        return ConfigError([Problem(group, option, unknown("option", option, error.options))])
    parent, override = getattr(error.__cause__, "parent_node", None), re.search(r"use \+(\S+?)=(.*)", str(error))
    if override is None or not isinstance(parent, DictConfig):
        return ConfigError(_message(error))
    key = str(error.__cause__.key)  # type: ignore[union-attr]
    return ConfigError([Problem(override[1], override[2], unknown("key", key, map(str, parent)))])


def _message(error: Exception) -> str:
    """Hydra's message with the causes that name keys and values, without its internals."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        lines = [line.strip() for line in str(current).splitlines() if line.strip()]
        text = "; ".join(line for line in lines if not line.startswith(HYDRA_ONLY))
        if text and text not in parts:
            parts.append(text)
        current = current.__cause__
    return "; ".join(parts)
