"""One place where components are registered by group and name.

A component is a configuration dataclass that can build the thing it configures. The command line copies
this table into Hydra's ConfigStore; a notebook looks components up directly. There is no directory
scanning: each package's ``__init__`` imports its modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moetrain.errors import ConfigError, Problem

T = TypeVar("T")

_COMPONENTS: dict[str, dict[str, type]] = {}


def register(group: str, name: str, *, source: str = "") -> Callable[[type[T]], type[T]]:
    """Class decorator: make a configuration dataclass known as ``group=name``.

    source: where the method is from (paper and equation), shown by ``moetrain list``.
    Raises ValueError if the name is already taken in the group.
    """

    def add(cls: type[T]) -> type[T]:
        names = _COMPONENTS.setdefault(group, {})
        if name in names:
            raise ValueError(f"{group}={name} is already registered by {names[name].__module__}")
        cls.kind = name  # type: ignore[attr-defined]
        cls.group = group  # type: ignore[attr-defined]
        cls.source = source  # type: ignore[attr-defined]
        names[name] = cls
        return cls

    return add


def components(group: str) -> dict[str, type]:
    """All registered components of a group by name, in the order of registration."""
    return dict(_COMPONENTS.get(group, {}))


def groups() -> list[str]:
    """Names of all groups that have at least one component."""
    return sorted(_COMPONENTS)


def lookup(group: str, name: str, *, field: str | None = None) -> type:
    """The component registered as ``group=name``.

    Raises ConfigError naming ``field`` (the group's name by default) and the valid names.
    """
    names = _COMPONENTS.get(group, {})
    if name not in names:
        valid = ", ".join(names) or "nothing registered"
        raise ConfigError([Problem(field or group, name, f"must be one of: {valid}")])
    return names[name]
