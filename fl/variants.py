"""What a sweep runs: the jobs of the lists on the command line, or of a preset's section ``sweep:``.

A section compares *variants*, each of several settings, and gives each the same chance::

    sweep:
      axes: {seed: [0, 1, 2]}                # crossed with everything
      tune: {key: local.lr, by: clients}     # chosen for each variant, see `fl.comparison`
      target: 0.8                            # metric for "rounds to target", "bytes to target"
      variants:
        fedit: {set: [adapter=lora, aggregator=fedavg], tune: [0.001, 0.003]}
        ffa: {set: [adapter=ffa], tune: [0.003, 0.01]}

Jobs are variants x its values of the tuned setting x axes. The command line wins: ``seed=0`` or ``seed=0,1`` replaces
an axis, ``local.lr=0.01`` every variant's values, ``adapter=lora`` what a variant sets, ``sweep.target=0.7`` what the
section says; another list is a further axis, and ``variants=fedit,ffa`` leaves the others out.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl.compose import SECTION, alternatives, expand, sweep_section
from fl.config import build, setting
from fl.errors import ConfigError
from fl.report.load import plain

CHOSEN = "variants"  # the word of the command line that names some variants


@dataclass(frozen=True)
class Tune:
    """The setting that is chosen for each variant, and what by: ``clients`` is the mean over clients' own test sets."""

    key: str | None = setting(None, help="the setting whose value is chosen for each variant")
    by: str = setting("clients", choices=["clients"], help="clients: the mean over clients' own test sets at the end")
    values: list[Any] = setting([], help="the values for variants that list none")


@dataclass(frozen=True)
class Variant:
    """One thing compared: the words that make it, and its values of the tuned setting."""

    set: list[str] = setting([], help="settings and options, as on the command line")
    tune: list[Any] = setting([], help="values of the tuned setting")


@dataclass(frozen=True)
class Section:
    """A preset's section ``sweep:``."""

    variants: dict[str, Variant]
    axes: dict[str, list[Any]] = setting({}, help="settings and their values, crossed with everything")
    tune: Tune = setting(Tune())
    target: float | None = setting(None, help="the central test metric whose first round is looked for")


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its words, what of them varies in the sweep (key -> value as text), its variant."""

    words: list[str]
    varied: dict[str, str]
    variant: str | None = None

    @property
    def label(self) -> str:
        return "  ".join([*([self.variant] if self.variant else []), *(f"{k}={v}" for k, v in self.varied.items())])


@dataclass(frozen=True)
class Plan:
    """A sweep's jobs, and what sweep.json says of them all: axes, common words, and of a section the rest of it."""

    about: dict[str, Any]
    jobs: list[Job]

    @property
    def compares_variants(self) -> bool:
        return "variants" in self.about


def plan(overrides: Sequence[str]) -> Plan:
    """The jobs of the command line, by the section of its preset where it has one.

    Raises `ConfigError`, which names the key, for a section that is wrong. Whether the jobs' settings are allowed is
    for `fl.experiment.Settings.of` to say.
    """
    words = alternatives(overrides)
    swept_preset = next((values for key, values, _ in words if key == "experiment" and values is not None), None)
    if swept_preset is not None:
        others = [w[0] for key, _, w in words if key != "experiment"]
        for name in swept_preset:
            if sweep_section([*others, f"experiment={name}"]) is not None:
                allowed = f"{name} has a sweep section, and is swept by itself"
                raise ConfigError("experiment", ",".join(swept_preset), allowed, f"Choose experiment={name} alone.")
    found = None if swept_preset is not None else sweep_section(overrides)
    if found is None:
        for key, values, given in words:
            if key == CHOSEN:
                shown = ",".join(values) if values else given[0].partition("=")[2]
                way_out = "Choose an experiment that has a section `sweep`."
                raise ConfigError(key, shown, "there are no variants here", way_out)
        return _of_lists(overrides)
    preset = next((w[0].partition("=")[2] for key, _, w in reversed(words) if key == "experiment"), "config")
    try:
        section = _checked(found)
    except ConfigError as error:
        way_out = f"It is in the section `sweep` of {preset}."
        raise ConfigError(error.key, error.value, error.allowed, way_out) from error
    return _of_section(section, [w for w in overrides if not _word_key(w).startswith(f"{SECTION}.")])


def _of_lists(overrides: Sequence[str]) -> Plan:
    axes, jobs = expand(overrides)
    common = [o for o in overrides if not o.startswith("hydra.") and _word_key(o) not in axes]
    about = {"axes": {key: [plain(v) for v in values] for key, values in axes.items()}, "common": common}
    return Plan(about, [Job(job, {k: v for k, v in map(_split, job) if k in axes}) for job in jobs])


def _of_section(section: Section, overrides: Sequence[str]) -> Plan:
    words = alternatives(overrides)
    given = {key for key, _, _ in words}
    axes = {key: [(text(v), f"{key}={text(v)}") for v in values] for key, values in section.axes.items()}
    axes = {key: values for key, values in axes.items() if key not in given}
    tune, typed_values, fixed, chosen = section.tune.key, None, [], list(section.variants)
    for key, values, alternative in words:
        if key == CHOSEN:
            chosen = _named(section, values or [alternative[0].partition("=")[2]])
        elif values is None:
            fixed.append(alternative[0])
        elif key == tune:
            typed_values = list(zip(values, alternative))
        elif key in axes:
            raise ConfigError(key, ",".join(values), "one list for each setting", "Join the two lists.")
        else:
            axes[key] = list(zip(values, alternative))
    jobs, variants = [], {}
    for name in chosen:
        variant = section.variants[name]
        own = [word for word in variant.set if _word_key(word) not in given]
        grid = [(text(v), f"{tune}={text(v)}") for v in variant.tune or section.tune.values]
        if tune in given:
            grid = typed_values or []
        variants[name] = {"set": own, "tune": [plain(value) for value, _ in grid]}
        choices = {tune: grid, **axes} if grid and tune else axes
        for combination in itertools.product(*choices.values()):
            varied = {key: value for key, (value, _) in zip(choices, combination)}
            jobs.append(Job([*fixed, *own, *(word for _, word in combination)], varied, name))
    about = {
        "axes": {key: [plain(value) for value, _ in pairs] for key, pairs in axes.items()},
        "common": [word for word in fixed if not word.startswith("hydra.")],
        "variants": variants,
        "tune": {"key": tune, "by": section.tune.by} if tune else None,
        "target": section.target,
    }
    return Plan(about, jobs)


def _named(section: Section, names: Sequence[str]) -> list[str]:
    """The variants that the command line names, in the section's order."""
    for name in names:
        if name not in section.variants:
            near = difflib.get_close_matches(name, section.variants, n=1)
            way_out = f"Did you mean {near[0]}?" if near else ""
            raise ConfigError(CHOSEN, name, "one of " + ", ".join(section.variants), way_out)
    return [name for name in section.variants if name in names]


def _checked(found: Any) -> Section:
    if not isinstance(found, Mapping):
        raise ConfigError(SECTION, found, "it stands for several settings: axes, target, tune, variants")
    section: Section = build({str(k): v for k, v in found.items()}, SECTION, Section)
    tune = section.tune.key
    if not section.variants:
        raise ConfigError(f"{SECTION}.variants", {}, "at least one variant")
    for key, values in section.axes.items():
        where = f"{SECTION}.axes.{key}"
        if not values:
            raise ConfigError(where, values, "at least one value")
        if key == tune:
            raise ConfigError(where, values, "the tuned setting is no axis")
        _each_once(where, values)
        _may_vary(where, key, values)
    if tune is not None:
        _may_vary(f"{SECTION}.tune.key", tune, tune)
    _each_once(f"{SECTION}.tune.values", section.tune.values)
    if section.tune.values and tune is None:
        raise ConfigError(f"{SECTION}.tune.key", None, "the setting whose values are listed")
    for name, variant in section.variants.items():
        where = f"{SECTION}.variants.{name}"
        if not re.fullmatch(r"[A-Za-z][\w.+-]*", name):
            raise ConfigError(where, name, "a name of letters, digits and _ . + -, a letter first")
        _each_once(f"{where}.tune", variant.tune)
        if variant.tune and tune is None:
            raise ConfigError(f"{where}.tune", variant.tune, f"{SECTION}.tune.key does not say which setting these are")
        _check_words(f"{where}.set", variant.set, {*section.axes, tune})
    return section


def _check_words(where: str, words: Sequence[str], varied: set[str | None]) -> None:
    counts: Counter[str] = Counter()
    for key, values, _ in alternatives(words):
        if values is not None:
            raise ConfigError(f"{where}: {key}", ",".join(values), "a variant has one value for each setting")
        if key in varied:
            raise ConfigError(f"{where}: {key}", list(words), "the sweep gives it its values, not the variant")
        _may_vary(f"{where}: {key}", key, list(words))
        counts[key] += 1
        if counts[key] > 1:
            raise ConfigError(f"{where}: {key}", list(words), "a variant has one value for each setting")


def _may_vary(where: str, key: str, value: Any) -> None:
    if key in ("experiment", CHOSEN) or key.partition(".")[0] in ("hydra", SECTION):
        raise ConfigError(where, value, "a sweep can't vary that")


def _each_once(where: str, values: Sequence[Any]) -> None:
    shown = [text(v) for v in values]
    if len(set(shown)) < len(shown):
        raise ConfigError(where, values, "each value once")


def text(value: Any) -> str:
    """A value of the section as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(text(v) for v in value) + "]"
    return str(value)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _word_key(override: str) -> str:
    return _split(override)[0]


def named(error: ConfigError, job: Job) -> ConfigError:
    """The error of a job's settings, saying which variant it is in."""
    if job.variant is None:
        return error
    way_out = str(error).partition(f"{error.allowed}.")[2].strip()
    return ConfigError(error.key, error.value, error.allowed, f"{way_out} This is variant {job.variant}.".strip())
