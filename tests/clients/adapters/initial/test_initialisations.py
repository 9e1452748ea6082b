"""What holds for every initialisation, on a layer that is not square."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from clients.adapters.initial import DataDriven, Initialisation, Start
from clients.adapters.initial.base import Site
from fl.config import build
from fl.errors import ConfigError, ShoalError
from fl.keys import torch_generator

CONFIGS = Path(__file__).parents[4] / "configs" / "adapter" / "init"
NAMES = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
# The options that lead to other code than the defaults, beside these.
VARIANTS = {
    "corda": [{"mode": "kpm"}],
    "lora_ga": [
        *({"direction": d, "rule": r} for d in ("ArBr", "A2rBr", "random") for r in ("peft", "authors")),
        *({"scale": s, "rule": r} for s in ("weight_svd", "gd_scale", "unit") for r in ("peft", "authors")),
    ],
}
CASES = [(n, v) for n in NAMES for v in [{}, *VARIANTS.get(n, [])]]
IDS = ["-".join([n, *map(str, v.values())]) for n, v in CASES]
DATA = [c for c in CASES if c[0] in ("corda", "eva", "lora_ga", "lora_sb")]
OUT, IN, RANK, SCALE = 9, 14, 4, 1.7


def make(name: str, options: dict | None = None) -> Initialisation:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return build({**content, **(options or {})}, "adapter.init", Initialisation)


def draw(key: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator("initial", key), dtype=torch.float64)


def statistic(init: Initialisation, out: int = OUT, inputs: int = IN) -> torch.Tensor | None:
    if init.statistic == "moment":
        x = draw("x", 40, inputs) * torch.linspace(0.2, 3, inputs)
        return x.T @ x
    return draw("g", out, inputs) if init.statistic == "gradient" else None


def begin(init: Initialisation, out: int = OUT, inputs: int = IN, seed: int = 1, rank: int = RANK, **more) -> Start:
    weight = more.pop("weight", draw("w", out, inputs))
    given = more.pop("statistic", statistic(init, out, inputs))
    return init.start(Site(weight, given, rank, SCALE, torch_generator(seed, "init"), **more))


def change(start: Start) -> torch.Tensor:
    core = torch.eye(len(start.a), dtype=start.a.dtype) if start.core is None else start.core
    return SCALE * start.b @ core @ start.a


def same(one: Start, two: Start) -> bool:
    def tensors(start: Start):
        return [start.a, start.b, *(start.base or ()), *([] if start.core is None else [start.core])]

    return all(torch.equal(x, y) for x, y in zip(tensors(one), tensors(two), strict=True))


def test_there_are_the_initialisations_of_the_field():
    assert set(NAMES) == {
        "kaiming", "gaussian", "orthonormal", "pissa", "olora", "eva", "corda", "lora_ga", "lora_xs", "lora_sb",
        "orthonormal_core",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_its_class_s_settings_with_their_defaults(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and 15 < len(lines[0]) < 110
    content = yaml.safe_load("\n".join(lines))
    cls = type(make(name))
    assert content.pop("_target_") == f"clients.adapters.initial.{name}.{cls.__name__}"
    assert content == {f.name: f.default for f in dataclasses.fields(cls)}
    assert all(f.metadata.get("help") for f in dataclasses.fields(cls))
    assert make(name) == cls()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize(("out", "inputs"), [(9, 14), (14, 9)], ids=str)
def test_shapes_are_those_of_the_adapter(name, options, out, inputs):
    init = make(name, options)
    start = begin(init, out, inputs)
    assert start.a.shape == (RANK, inputs) and start.b.shape == (out, RANK)
    assert init.form == ({"bra"} if start.core is not None else {"ba"})
    assert start.core is None or start.core.shape == (RANK, RANK)
    assert init.changes_base == (start.base is not None)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_training_begins_at_the_base_weight_itself(name, options):
    """But for LoRA-SB, which begins a step further (`test_lora_sb`), and LoRA-XS, which begins within 1e-5 of it."""
    start = begin(make(name, options))
    moved = change(start)
    if start.base is None:
        assert (moved.norm() == 0) == (name not in ("lora_xs", "lora_sb"))
    else:
        left, right = start.base
        assert moved.norm() > 1e-3
        torch.testing.assert_close(left @ right, -moved, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_the_start_comes_from_its_key_alone(name, options):
    init = make(name, options)
    one = begin(init)
    torch.manual_seed(5)
    assert same(begin(init), one)
    drawn = name in ("kaiming", "gaussian", "orthonormal", "orthonormal_core", "lora_xs")
    assert same(begin(init, seed=2), one) != (drawn or options.get("direction") == "random")


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_is_in_float32_at_least_and_the_base_takes_back_what_is_really_added(name, options, dtype):
    init = make(name, options)
    weight = draw("w", OUT, IN).to(dtype)
    start = begin(init, weight=weight)
    assert start.a.dtype == start.b.dtype == torch.promote_types(dtype, torch.float32)
    if start.base is not None:
        left, right = start.base
        assert torch.equal(right, start.a) and torch.equal(left, -SCALE * start.b)


@pytest.mark.parametrize(("name", "options"), DATA, ids=str)
def test_data_count_by_their_direction_but_in_peft_s_lora_ga(name, options):
    init = make(name, options)
    given = statistic(init)
    one, two = begin(init), begin(init, statistic=16 * given)  # a power of two: no rounding
    close = all(torch.allclose(x, y, rtol=1e-9, atol=1e-13) for x, y in ((one.a, two.a), (one.b, two.b)))
    lengthy = name == "lora_ga" and init.rule == "peft" and init.scale != "weight_svd"
    assert close != lengthy
    if lengthy:
        assert same(begin(init, statistic=16 * given, count=16), one)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_rank_that_the_layer_can_not_have_is_refused(name, options):
    init = make(name, options)
    most = {"lora_ga": 4, "eva": IN, "orthonormal": IN}.get(name, OUT)
    assert begin(init, rank=most).a.shape[0] == most
    if name in ("kaiming", "gaussian"):
        begin(init, rank=99)
        return
    with pytest.raises(ConfigError, match=rf"adapter.rank={most + 1} is not allowed: at most {most}"):
        begin(init, rank=most + 1)


@pytest.mark.parametrize(("name", "options"), DATA, ids=str)
def test_a_statistic_is_asked_for_and_checked(name, options):
    init = make(name, options)
    assert isinstance(init, DataDriven)
    given = statistic(init)
    for wrong in (None, given.T[:, :3]):
        with pytest.raises(ValueError, match="needs a statistic of shape"):
            begin(init, statistic=wrong)
    given[0, 0] = float("nan")
    with pytest.raises(ShoalError, match="not finite"):
        begin(init, statistic=given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["lora", "b", "alternating", "gated", "core"])
def test_an_adapter_that_can_not_begin_so_is_refused(name, form):
    init = make(name)
    fits = ("bra" in init.form) == (form == "core") and not (form == "gated" and init.changes_base)
    if fits:
        init.check(form)
    else:
        with pytest.raises(ConfigError, match=rf"adapter.init='{type(init).__name__}' is not allowed"):
            init.check(form)
