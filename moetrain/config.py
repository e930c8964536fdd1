"""Typed configuration: plain dataclasses, one strict conversion from and to plain dictionaries.

Composition (groups, overrides, sweeps, interpolation) is Hydra's work; this module has no dependency on it,
so that workers, notebooks and bare machines read a run's ``config.yaml`` without it. A value is checked three
times: its type, its declared range, and the cross-field rules of :meth:`problems`. All problems are
reported together, by their dotted names.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from moetrain import registry
from moetrain.errors import ConfigError, Problem

T = TypeVar("T")


def setting(
    default: Any = MISSING,
    *,
    doc: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    follows: str | None = None,
    group: str | None = None,
    schedule: str | None = None,
    default_factory: Any = MISSING,
) -> Any:
    """A dataclass field with its one-line documentation (with unit) and valid range.

    ge, gt, le, lt: bounds of a number. follows: on the command line the default is the value of that other
    dotted field. group: the value is a component (or a dictionary of components) of that registry group,
    chosen by its ``kind``. schedule: the setting starts or bounds a course over training steps; where that is from.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"doc": doc, "bounds": {k: v for k, v in bounds.items() if v is not None}, "follows": follows, "group": group}
    metadata["schedule"] = schedule
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata, kw_only=True)


class Component:
    """Base of registered configurations. ``kind`` and ``group`` are set by :func:`moetrain.registry.register`."""

    kind: typing.ClassVar[str] = ""
    group: typing.ClassVar[str] = ""
    source: typing.ClassVar[str] = ""

    def problems(self, path: str) -> Iterable[Problem]:
        """What is wrong with the fields taken together; ``path`` is the dotted name of this component."""
        return ()


def load(cls: type[T], data: Mapping[str, Any], *, path: str = "") -> T:
    """Build ``cls`` from a plain dictionary.

    Raises ConfigError that lists every unknown key, missing key, wrong type, value out of range and broken
    cross-field rule, with dotted names below ``path``.
    """
    problems: list[Problem] = []
    value = _dataclass(cls, data, path, problems)
    if problems:
        raise ConfigError(problems)
    return typing.cast(T, value)


def dump(config: Any) -> Any:
    """The plain dictionary (lists, numbers, strings) that :func:`load` turns back into the same object."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        plain = {f.name: dump(getattr(config, f.name)) for f in dataclasses.fields(config)}
        kind = getattr(config, "kind", "")
        return {"kind": kind, **plain} if kind else plain
    if isinstance(config, Mapping):
        return {str(key): dump(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [dump(value) for value in config]
    return config


def defaults(cls: type) -> dict[str, Any]:
    """The defaults of a configuration class as Hydra should see them: ``follows`` fields are interpolations,
    required fields are ``???``."""
    plain: dict[str, Any] = {"kind": cls.kind} if getattr(cls, "kind", "") else {}  # type: ignore[attr-defined]
    for f in dataclasses.fields(cls):
        if f.metadata.get("follows"):
            plain[f.name] = "${" + f.metadata["follows"] + "}"
        elif f.default is not MISSING:
            plain[f.name] = dump(f.default)
        elif f.default_factory is not MISSING:
            plain[f.name] = dump(f.default_factory())
        elif dataclasses.is_dataclass(_hints(cls)[f.name]):
            plain[f.name] = defaults(_hints(cls)[f.name])
        else:
            plain[f.name] = "???"
    return plain


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """What is wrong with a name that is not among the valid ones, for :class:`Problem`. what: ``key``, ``option``."""
    close = difflib.get_close_matches(name, valid := list(valid), n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"unknown {what}{hint}; valid {what}s: {', '.join(valid) or 'none'}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _dataclass(cls: type, data: Any, path: str, problems: list[Problem]) -> Any:
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        problems.append(Problem(path, data, "must be a mapping of settings"))
        return None
    before = len(problems)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = _hints(cls)
    for key in data:
        if key not in fields and key != "kind":
            problems.append(Problem(_join(path, str(key)), data[key], unknown("key", str(key), fields)))
    values = {}
    for name, f in fields.items():
        here = _join(path, name)
        if name not in data or (isinstance(data[name], str) and data[name] == "???"):
            if f.default is MISSING and f.default_factory is MISSING:
                problems.append(Problem(here, None, "required, but not given"))
            continue
        found = len(problems)
        if f.metadata.get("group"):
            values[name] = _component_field(f.metadata["group"], hints[name], data[name], here, problems)
        else:
            values[name] = _convert(hints[name], data[name], here, problems)
        if len(problems) == found:
            problems.extend(_range(values[name], f.metadata.get("bounds", {}), here))
    if len(problems) > before:
        return None
    value = cls(**values)
    if hasattr(value, "problems"):
        problems.extend(value.problems(path))
    return value


def _component_field(group: str, hint: Any, data: Any, path: str, problems: list[Problem]) -> Any:
    if get_origin(hint) is dict:
        if data is None:
            return {}
        if not isinstance(data, Mapping):
            problems.append(Problem(path, data, f"must be a mapping from a name to a {group}"))
            return None
        return {str(k): _component(group, v, _join(path, str(k)), problems) for k, v in data.items()}
    if data is None and type(None) in get_args(hint):
        return None
    return _component(group, data, path, problems)


def _component(group: str, data: Any, path: str, problems: list[Problem]) -> Any:
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return data
    if not isinstance(data, Mapping) or "kind" not in data:
        problems.append(Problem(path, data, f"must be a mapping with a kind, one of: {', '.join(registry.components(group))}"))
        return None
    try:
        cls = registry.lookup(group, data["kind"], field=_join(path, "kind"))
    except ConfigError as error:
        problems.extend(error.problems)
        return None
    return _dataclass(cls, data, path, problems)


def _range(value: Any, bounds: Mapping[str, float], path: str) -> Iterable[Problem]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    checks = {"ge": (value >= bounds.get("ge", value), ">="), "gt": ("gt" not in bounds or value > bounds["gt"], ">"),
              "le": (value <= bounds.get("le", value), "<="), "lt": ("lt" not in bounds or value < bounds["lt"], "<")}  # fmt: skip
    if any(not checks[name][0] for name in bounds):
        wanted = " and ".join(f"{checks[name][1]} {bound:g}" for name, bound in bounds.items())
        yield Problem(path, value, f"must be {wanted}")


def _convert(hint: Any, data: Any, path: str, problems: list[Problem]) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), data, path, problems)
    if origin is Literal:
        # YAML 1.1 reads a bare on/off/yes/no as a boolean
        text = {True: "on", False: "off"}.get(data, data) if isinstance(data, bool) else data
        if text in get_args(hint):
            return text
        problems.append(Problem(path, data, f"must be one of: {', '.join(map(str, get_args(hint)))}"))
        return None
    if origin in (Union, types.UnionType):
        if data is None and type(None) in get_args(hint):
            return None
        attempts = [a for a in get_args(hint) if a is not type(None)]
        for option in attempts:
            trial: list[Problem] = []
            value = _convert(option, data, path, trial)
            if not trial:
                return value
        expected = " or ".join(_describe(a) for a in get_args(hint))
        problems.append(Problem(path, data, f"must be {expected}"))
        return None
    if origin in (list, tuple):
        if not isinstance(data, (list, tuple)):
            problems.append(Problem(path, data, "must be a list"))
            return None
        item = get_args(hint)[0]
        values = [_convert(item, value, f"{path}[{i}]", problems) for i, value in enumerate(data)]
        return values if origin is list else tuple(values)
    if origin is dict:
        if not isinstance(data, Mapping):
            problems.append(Problem(path, data, "must be a mapping"))
            return None
        return {str(k): _convert(get_args(hint)[1], v, _join(path, str(k)), problems) for k, v in data.items()}
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if hint is Any or (isinstance(data, hint) and not (isinstance(data, bool) and hint is not bool)):
        return data
    if hint is float and isinstance(data, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(data)
        except ValueError:
            pass  # falls through to the problem below
    problems.append(Problem(path, data, f"must be {_describe(hint)}"))
    return None


def _describe(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


@dataclass
class Described:
    """A setting as shown to users."""

    name: str
    default: Any
    doc: str


def describe(cls: type) -> list[Described]:
    """Dotted name, default and documentation of every setting of a configuration class."""
    plain, described = defaults(cls), []
    for f in dataclasses.fields(cls):
        hint = _hints(cls)[f.name]
        if dataclasses.is_dataclass(hint):
            inner = describe(typing.cast(type, hint))
            described += [Described(f"{f.name}.{s.name}", s.default, s.doc) for s in inner]
        else:
            described.append(Described(f.name, plain[f.name], f.metadata.get("doc", "")))
    return described
