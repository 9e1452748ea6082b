from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fl.config import build, setting
from fl.errors import ConfigError, RunStopped, ShoalError


@dataclass(frozen=True)
class Inner:
    size: int = setting(1, ge=1)


@dataclass(frozen=True)
class Other(Inner):
    pass


@dataclass(frozen=True)
class Example:
    """One field of every kind."""

    needed: int
    whole: int = setting(3, ge=0, le=10, help="a count")
    number: float = setting(0.5, gt=0, lt=1)
    open_number: float = 2.0
    text: str = "a"
    flag: bool = False
    choice: str = setting("sgd", choices=["sgd", "adam"])
    literal: Literal["x", "y"] = "x"
    maybe: float | None = setting(None, gt=0)
    either: int | str = setting("auto", ge=1)
    many: list[int] = setting([1, 2])
    pair: tuple[float] = (1.0,)
    table: dict[str, float] = setting({})
    anything: Any = None
    inner: Inner = Inner()
    hidden: int = field(default=7, init=False)


TARGET = "tests.fl.test_config.Example"


def made(**values: Any) -> Example:
    return build({"_target_": TARGET, "needed": 1, **values}, "group.part")


def refused(**values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        made(**values)
    assert "\n" not in str(raised.value)
    return raised.value


def test_defaults_are_those_of_the_class():
    assert made() == Example(1)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("whole", 4, 4), ("whole", 4.0, 4), ("number", 0.25, 0.25), ("open_number", 3, 3.0), ("text", "b", "b"),
        ("text", 5, "5"), ("flag", True, True), ("choice", "adam", "adam"), ("literal", "y", "y"), ("maybe", 2, 2.0),
        ("maybe", None, None), ("either", 5, 5), ("either", "auto", "auto"), ("many", [], []),
        ("many", (3, 4.0), [3, 4]), ("pair", [2], (2.0,)), ("table", {"a": 1}, {"a": 1.0}),
        ("anything", {"x": [1]}, {"x": [1]}),
        ("inner", {"size": 5}, Inner(5)), ("inner", {"_target_": "tests.fl.test_config.Other", "size": 2}, Other(2)),
        ("inner", Other(3), Other(3)),
    ],
)  # fmt: skip
def test_what_is_accepted_and_what_becomes_of_it(name, given, kept):
    value = getattr(made(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("whole", 2.5, "a whole number"), ("whole", "3", "a whole number"), ("whole", True, "a whole number"),
        ("whole", None, "a whole number"), ("whole", -1, ">= 0 and <= 10"), ("whole", 11, ">= 0 and <= 10"),
        ("number", 0, "> 0 and < 1"), ("number", 1.0, "> 0 and < 1"), ("number", "a", "a number"),
        ("number", math.nan, "> 0 and < 1"), ("open_number", math.inf, "a number that is finite"),
        ("open_number", True, "a number"), ("text", None, "text"), ("text", [1], "text"), ("flag", 1, "true or false"),
        ("flag", "yes", "true or false"), ("choice", "sdg", "one of sgd, adam"), ("literal", "z", "one of x, y"),
        ("maybe", 0, "> 0"), ("maybe", "x", "a number or null"), ("either", 0, ">= 1"),
        ("many", 3, "a list of whole numbers"), ("many", "12", "a list of whole numbers"),
        ("table", [1], "a mapping"), ("inner", 3, "several settings: size"),
    ],
)  # fmt: skip
def test_what_is_refused(name, value, allowed):
    error = refused(**{name: value})
    assert error.key == f"group.part.{name}"
    assert str(error).startswith(f"group.part.{name}={error.value!r} is not allowed: ")
    assert allowed in str(error)


def test_the_element_of_a_list_or_mapping_is_named():
    assert refused(many=[1, "a"]).key == "group.part.many[1]"
    assert refused(table={"b": "x"}).key == "group.part.table.b"
    assert refused(inner={"size": 0}).key == "group.part.inner.size"


def test_choices_and_unknown_settings_come_with_the_nearest():
    assert "Did you mean sgd?" in str(refused(choice="sdg"))
    error = refused(numbr=1)
    assert error.key == "group.part.numbr"
    assert "no such setting; group.part has anything, choice" in str(error)
    assert str(error).endswith("Did you mean number?")
    assert "See `shoal list group/part`." in str(refused(zzz=1))
    assert "hidden" not in str(error)
    assert refused(hidden=3).key == "group.part.hidden"


def test_an_unknown_setting_is_named_as_it_was_typed():
    error = refused(new={"deep": {"key": 1}})
    assert (error.key, error.value) == ("group.part.new.deep.key", 1)


def test_a_missing_setting_is_named():
    with pytest.raises(
        ConfigError, match=r"group\.part\.needed=None .*needed\. Give one with group\.part\.needed=VALUE"
    ):
        build({"_target_": TARGET}, "group.part")


def test_without_a_group_the_experiment_is_named():
    with pytest.raises(ConfigError, match=r"^foo=1 is not allowed: no such setting; the experiment has") as raised:
        build({"needed": 1, "foo": 1}, "", Example)
    assert str(raised.value).endswith("See `shoal list`.")


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("os.system", "a dataclass"), ("fl.nothing.Here", "an importable class"), ("fl.config.Nothing", "importable"),
        ("Nothing", "importable"), ("", "importable"), (3, "importable"),
        (TARGET, "a subclass of tests.fl.test_config.Inner"),
    ],
)  # fmt: skip
def test_a_target_has_to_be_a_class_of_settings(target, allowed):
    with pytest.raises(ConfigError, match=rf"^group\._target_=.*{allowed}"):
        build({"_target_": target}, "group", Inner)


def test_a_group_needs_an_option():
    with pytest.raises(ConfigError, match=r"a group with a _target_.*shoal list a/b"):
        build({"size": 1}, "a.b")
    with pytest.raises(ConfigError, match=r"a\.b=5 .*Choose one with a/b=NAME; see `shoal list a/b`"):
        build(5, "a.b")
    with pytest.raises(ConfigError, match=r"clients=3 .*several settings: size\. Set clients\.size=VALUE"):
        build(3, "clients", Inner)


def test_a_list_default_is_not_shared():
    made().many.append(9)
    assert made().many == [1, 2]


def test_exit_codes():
    assert (ShoalError.exit_code, ConfigError.exit_code, RunStopped.exit_code) == (1, 2, 3)
    assert str(ConfigError("a.b", 1, "a word", "Do this.")) == "a.b=1 is not allowed: a word. Do this."
    assert str(ConfigError("a.b", 1, "a word")) == "a.b=1 is not allowed: a word."
