"""Strict conversion of dictionaries to configurations, and the registry."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import moetrain.components  # noqa: F401
from moetrain import registry
from moetrain.config import Component, defaults, describe, dump, load, setting
from moetrain.errors import ConfigError, Problem
from moetrain.launch.compose import shipped


@dataclass(kw_only=True)
class Inner:
    width: int = setting(doc="units", ge=1)
    rate: float = setting(0.1, doc="per step", gt=0, lt=1)
    mode: Literal["on", "off", "auto"] = setting("auto", doc="mode")
    names: list[str] = setting(default_factory=list, doc="names")
    limit: int | None = setting(None, doc="limit", ge=0)
    flag: bool = setting(False, doc="flag")


@dataclass(kw_only=True)
class Outer:
    inner: Inner
    router: Component = setting(doc="router", group="router")
    loss: dict[str, Component] = setting(default_factory=dict, doc="losses", group="loss")

    def problems(self, path):
        if self.inner.width == 13:
            yield Problem("inner.width", 13, "must not be 13")


GOOD = {"inner": {"width": 2}, "router": {"kind": "topk", "top_k": 2}, "loss": {"a": {"kind": "z_loss"}}}


def test_round_trip():
    config = load(Outer, GOOD)
    assert config.inner.rate == 0.1 and config.router.top_k == 2 and config.loss["a"].coefficient == 0.001
    assert load(Outer, dump(config)) == config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"inner": {"width": 0}}, "inner.width = 0: must be >= 1"),
        ({"inner": {"width": "x"}}, "inner.width = 'x': must be an integer"),
        ({"inner": {"width": True}}, "inner.width = True: must be an integer"),
        ({"inner": {"width": 1.5}}, "inner.width = 1.5: must be an integer"),
        ({"inner": {"width": 13}}, "must not be 13"),
        ({"inner": {}}, "inner.width = None: required"),
        ({"inner": {"width": 1, "rate": 1.0}}, "inner.rate = 1.0: must be > 0 and < 1"),
        ({"inner": {"width": 1, "rat": 1.0}}, "inner.rat = 1.0: unknown key, did you mean rate?"),
        ({"inner": {"width": 1, "mode": "x"}}, "must be one of: on, off, auto"),
        ({"inner": {"width": 1, "names": "x"}}, "inner.names = 'x': must be a list"),
        ({"inner": {"width": 1, "limit": "x"}}, "inner.limit = 'x': must be an integer or null"),
        ({"inner": 3}, "inner = 3: must be a mapping"),
        ({"router": {"kind": "nope"}}, "router.kind = 'nope': must be one of: "),
        ({"router": {"top_k": 2}}, "router"),
        ({"router": {"kind": "topk", "top_k": 0}}, "router.top_k = 0"),
        ({"loss": {"a": {"kind": "z_loss", "coefficient": -1}}}, "loss.a.coefficient = -1.0"),
        ({"extra": 1}, "extra = 1: unknown key"),
    ],
)
def test_each_mistake_names_field_value_and_what_is_valid(change, field):
    with pytest.raises(ConfigError) as caught:
        load(Outer, {**GOOD, **change})
    assert field in str(caught.value)


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        load(Outer, {"inner": {"width": 0, "x": 1}, "router": {"kind": "topk", "top_k": "a"}, "y": 2})
    assert [problem.field for problem in caught.value.problems] == ["y", "inner.x", "inner.width", "router.top_k"]


def test_yaml_booleans_and_exponents():
    config = load(Outer, {**GOOD, "inner": {"width": 1, "mode": False, "rate": "1e-3"}})
    assert config.inner.mode == "off" and config.inner.rate == 1e-3


def test_defaults_for_the_command_line():
    plain = defaults(registry.lookup("router", "topk"))
    assert plain["kind"] == "topk" and plain["top_k"] == "${model.top_k}"
    assert all(entry.doc for entry in describe(registry.lookup("router", "topk")))


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="already registered"):
        registry.register("router", "topk")(type("Other", (), {}))


def test_every_registered_component_is_documented():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for group in registry.groups():
        for name, component in registry.components(group).items():
            assert (component.__doc__ or "").strip(), f"{group}={name} has no docstring"
            assert all(entry.doc for entry in describe(component)), f"{group}={name} has a setting without documentation"
            assert name in readme, f"README does not mention {group}={name}"
        for name in shipped(group):
            assert name in readme, f"README does not mention the preset {group}={name}"
