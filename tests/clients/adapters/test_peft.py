"""Any PEFT method by its name: its options, its defaults, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from clients.adapters.base import Adapter
from clients.adapters.initial.corda import CorDA
from clients.adapters.initial.eva import EVA
from clients.adapters.initial.lora_ga import LoRAGA
from clients.adapters.initial.olora import OLoRA
from clients.adapters.initial.pissa import PiSSA
from clients.adapters.lora import LoRA
from clients.adapters.peft import _MEANINGS, Peft
from clients.cohort import Cohort, CohortBatch
from fl.config import build as build_settings
from fl.errors import ConfigError
from tests.helpers import go, metrics, same_metrics
from tests.oracles.cohorts import apart, build, states
from tests.oracles.models import FAMILIES, batches, tiny
from tests.oracles.variants import merged, out_in, spaced, weights


def test_an_unknown_method_is_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"adapter\.method='LORRA' is not allowed: one of ADALORA.*LORA.*VERA"):
        Peft(method="LORRA").config(["q_proj"])


def test_an_unknown_option_is_refused_by_name_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"adapter\.options\.d_initiall=0\.2.*VeraConfig has .*d_initial"):
        Peft(method="vera", options={"d_initiall": 0.2}).config(["q_proj"])


def test_an_option_that_peft_refuses_is_refused_with_its_words():
    with pytest.raises(ConfigError, match=r"adapter\.options=.*OFTConfig refuses it \("):
        Peft(method="oft", options={"r": 3, "oft_block_size": 4}).config(["q_proj"])


@pytest.mark.parametrize("name", ["vera", "VERA", "Vera"])
def test_the_name_may_be_of_any_case(name):
    assert Peft(method=name).config(["q_proj"]).peft_type.value == "VERA"


def test_rank_is_r_unless_the_options_say_otherwise():
    assert Peft(method="vera", rank=5).config([]).r == 5
    assert Peft(method="vera", rank=5, options={"r": 7}).config([]).r == 7
    assert Peft(method="vera").config([]).r == 256  # PEFT's own


@pytest.mark.parametrize("method", ["ia3", "boft", "ln_tuning"])
def test_a_rank_is_refused_where_there_is_none(method):
    with pytest.raises(ConfigError, match=r"adapter\.rank=4.*has no rank r"):
        Peft(method=method, rank=4).config([])


def test_targets_are_the_models_the_settings_or_the_options():
    def names(peft: Peft) -> set[str]:
        base, targets = tiny("llama")
        found = Cohort(peft.attach(base, targets, 1), base.task).layout.names
        return {n.split(".")[6] for n in found}

    assert names(Peft(method="lora", rank=2)) == {"q_proj", "v_proj"}
    assert names(Peft(method="lora", rank=2, target_modules=["k_proj"])) == {"k_proj"}
    assert names(Peft(method="lora", rank=2, options={"target_modules": ["o_proj"]})) == {"o_proj"}


def test_methods_with_targets_of_their_own_take_pefts_defaults():
    """The model's list for LoRA would have whole weight matrices trained."""
    assert all("layernorm" in n or ".norm." in n for n in build("llama", Peft(method="ln_tuning")).layout.names)
    (name,) = build("llama", Peft(method="trainable_tokens", options={"token_indices": [3, 4]})).layout.names
    assert "embed_tokens" in name


def test_ia3_scales_the_outputs_unless_told_which_modules_are_feed_forward():
    """The scale has the length of what it multiplies: GPT-2's mlp.c_proj is 96 in and 24 out."""

    def scales(options: dict) -> set[int]:
        shapes = build("gpt2", Peft(method="ia3", target_modules=["mlp.c_proj"], options=options)).layout.shapes
        return {size for shape in shapes for size in shape if size > 1}

    assert scales({}) == {24}
    assert scales({"feedforward_modules": ["mlp.c_proj"]}) == {96}


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_prompt_are_refused(method, family):
    options = {"num_virtual_tokens": 4}
    with pytest.raises(ConfigError, match=f"adapter='{method}' is not allowed.*prompt learning"):
        build(family, Peft(method=method, options=options))


@pytest.mark.parametrize("method", ["TRAINABLE_TOKENS", "XLORA", "ADAPTION_PROMPT"])
def test_a_method_that_can_not_train_a_head_is_refused_on_a_classifier(method):
    with pytest.raises(ConfigError, match=f"adapter='{method}'.*head"):
        build("bert", Peft(method=method))


@pytest.mark.parametrize("initial", ["pissa_niter_4", "loftq", "mica"])
def test_initialisations_that_change_the_base_are_refused_before_they_do(initial):
    base, targets = tiny("llama")
    frozen = [p.detach().clone() for p in base.module.parameters()]
    allowed = r"one of true, false, gaussian, orthogonal, eva, corda, pissa, olora, lora_ga"
    with pytest.raises(ConfigError, match=rf"adapter\.options\.init_lora_weights='{initial}'.*{allowed}"):
        Peft(method="lora", options={"init_lora_weights": initial}).attach(base, targets, 1)
    assert all(torch.equal(a, b) for a, b in zip(frozen, base.module.parameters(), strict=True))


def lora(**options: Any) -> Peft:
    return Peft(method="lora", rank=3, options=options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"init_lora_weights": "pissa"}, PiSSA()),
        ({"init_lora_weights": "olora"}, OLoRA()),
        ({"init_lora_weights": "eva"}, EVA()),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "whiten": False}}, EVA()),
        (
            {"init_lora_weights": "eva", "init": {"source": "private", "noise": 2.0, "examples": 9}},
            EVA(source="private", noise=2.0, examples=9),
        ),
        (
            {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm", "verbose": True}},
            CorDA(mode="kpm"),
        ),
        (
            {
                "init_lora_weights": "lora_ga",
                "lora_ga_config": {"direction": "ArBr", "scale": "unit", "stable_gamma": 32},
                "init": {"source": "public", "rule": "authors"},
            },
            LoRAGA(direction="ArBr", scale="unit", gamma=32.0, source="public", rule="authors"),
        ),
    ],
    ids=lambda v: v.get("init_lora_weights") if isinstance(v, dict) else "",
)
def test_pefts_initialisations_are_made_by_the_server_with_the_same_meaning(options, expected):
    """PEFT itself is asked for its default, so it neither looks at data nor changes the base."""
    adapter = lora(**options)
    assert adapter.initialisation == expected and adapter.form == "lora"
    base, targets = tiny("llama")
    frozen = [p.detach().clone() for p in base.module.parameters()]
    model = adapter.attach(base, targets, 1)
    kept = [p for n, p in model.named_parameters() if ".lora_" not in n]
    assert all(torch.equal(a, b) for a, b in zip(frozen, kept, strict=True))
    config = model.peft_config["default"]
    assert config.init_lora_weights is True and config.r == 3
    assert config.eva_config is None and config.corda_config is None and config.lora_ga_config is None


def test_the_defaults_of_what_is_mapped_are_pefts_own():
    """A user who gives an empty configuration gets what PEFT would have taken."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

    assert LoraConfig().init_lora_weights is True
    assert CordaConfig().corda_method == CorDA().mode
    ours, theirs = LoRAGA(), LoraGAConfig()
    assert (ours.direction, ours.scale, ours.gamma) == (theirs.direction, theirs.scale, theirs.stable_gamma)
    given = {"eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}
    for part, cls in given.items():
        assert set(_MEANINGS[part]) <= {f.name for f in dataclasses.fields(cls)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, r"eva_config\.rho=2\.0.*the same ranks"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 0.9}}, r"eva_config\.tau=0\.9.*no counterpart"),
        ({"init_lora_weights": "eva", "eva_config": {"whiten": True}}, r"eva_config\.whiten=True"),
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}}, r"corda_config\.cache_file='x'"),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "up"}}, r"options\.init\.mode='up'.*ipm, kpm"),
        ({"init_lora_weights": "corda", "eva_config": {"rho": 1.0}}, r"options\.eva_config=.*null with CorDA"),
        ({"init_lora_weights": "eva", "eva_config": 3}, r"options\.eva_config=3.*a mapping"),
        ({"init_lora_weights": "pissa", "init": {"source": "public"}}, r"options\.init\.source='public'"),
        ({"init_lora_weights": "eva", "init": {"source": "anyone"}}, r"init\.source='anyone'.*public, client, clients"),
        ({"init": {"source": "public"}}, r"adapter\.options\.init=.*init_lora_weights one of eva"),
    ],
    ids=lambda v: "-".join(map(str, v.values()))[:40] if isinstance(v, dict) else "",
)
def test_settings_of_an_initialisation_that_mean_nothing_here_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        lora(**options)


def test_a_run_is_that_of_lora_with_the_start_of_that_name(tmp_path):
    """CorDA's statistic comes from the clients and its start changes the base; the same bits by either way."""
    init = "{init_lora_weights: corda, lora_alpha: 8, corda_config: {corda_method: kpm}, init: {examples: 8}}"
    peft = ("adapter=peft", "adapter.method=lora", "adapter.rank=4", f"adapter.options={init}")
    own = (
        "adapter.rank=4",
        "adapter.alpha=8",
        "adapter/init=corda",
        "adapter.init.mode=kpm",
        "adapter.init.examples=8",
    )
    first, second = (go(tmp_path / name, *words) for name, words in (("peft", peft), ("own", own)))
    assert first.folder != second.folder and same_metrics(first.folder, second.folder)
    assert any(e["event"] == "initialise" for e in metrics(first.folder))


def test_only_lora_has_initialisations():
    with pytest.raises(ConfigError, match=r"adapter\.options\.init="):
        Peft(method="vera", options={"init": {"source": "public"}})
    assert Peft(method="vera").initialisation is None and lora().initialisation is None
    other = Peft(method="adalora", options={"init_lora_weights": "eva", "total_step": 9})
    assert other.initialisation is None
    with pytest.raises(ConfigError, match=r"init_lora_weights='eva'.*one of true, false, gaussian, orthogonal\."):
        other.config([])


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "lora"),
        (
            {"lora_alpha": 5, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "bias": "none", "use_dora": False},
            "lora",
        ),
        ({"use_dora": True}, "other"),
        ({"bias": "lora_only"}, "other"),
        ({"lora_bias": True}, "other"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "other"),
    ],
    ids=str,
)
def test_plain_lora_is_a_product_of_two_factors(options, form):
    assert lora(**options).form == form
    assert Peft(method="vera").form == Peft(method="adalora").form == "other"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factors_of_plain_lora_are_known_with_their_scale(family):
    """Against the adapter of that name, and the weights that PEFT merges."""
    own = spaced(
        family,
        LoRA(rank=3, alpha=5.0, rslora=True, rank_pattern={"v_proj": 2})
        if family == "llama"
        else LoRA(rank=3, alpha=5.0, rslora=True),
    )
    options = {"lora_alpha": 5, "use_rslora": True} | ({"rank_pattern": {"v_proj": 2}} if family == "llama" else {})
    cohort = spaced(family, lora(**options))
    assert cohort.space.groups == own.space.groups and cohort.space.phases == own.space.phases
    state = states(cohort, 1)[0]
    frozen, new = tiny(family, dtype=torch.float64)[0].module, weights(merged(cohort, state))
    pairs = list(zip(own.space.delta(state.numpy()), cohort.space.delta(state.numpy()), strict=True))
    assert len(pairs) > 1
    for mine, theirs in pairs:
        assert mine.name == theirs.name
        np.testing.assert_array_equal(mine.left, theirs.left)
        name = theirs.name.removeprefix("base_model.model.")
        change = out_in(frozen, name, (new[name] - weights(frozen)[name]).detach())
        np.testing.assert_allclose(theirs.left @ theirs.right, change, rtol=1e-9, atol=1e-12)


def test_other_methods_have_no_factors_but_a_head():
    space = spaced("bert", Peft(method="vera", rank=4)).space
    assert not space.modules and set(space.groups) == {"adapter", "head"}
    assert not spaced("bert", lora(use_dora=True)).space.modules


@pytest.mark.parametrize("initial", [False, "gaussian", "orthogonal"])
def test_other_initialisations_are_taken(initial):
    adapter = Peft(method="lora", rank=4, options={"init_lora_weights": initial})
    assert not torch.equal(build("llama", adapter).initial, build("llama", Peft(method="lora", rank=4)).initial)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("own", "general"),
    [
        (LoRA(rank=3, alpha=5.0), {"lora_alpha": 5.0}),
        (LoRA(rank=3, alpha=5.0, rslora=True), {"lora_alpha": 5.0, "use_rslora": True}),
        (LoRA(rank=3, alpha=5.0, dora=True), {"lora_alpha": 5.0, "use_dora": True}),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_lora_by_either_adapter_is_the_same(family, own: Adapter, general):
    first, second = build(family, own), build(family, Peft(method="lora", rank=3, options=general))
    assert first.layout == second.layout and torch.equal(first.initial, second.initial)
    batch = CohortBatch.of(batches(first.task, [2, 3]))
    mine, theirs = (c.gradients(states(first, 2), batch)[1] for c in (first, second))
    assert apart(mine, theirs) <= 1e-12


@pytest.mark.parametrize("method", ["adamss", "frod", "psoft", "tinylora"])
def test_methods_that_factor_the_base_are_refused_beside_bfloat16(method):
    """Their frozen factors would be others beside the float32 base that the adapter is saved for."""
    with pytest.raises(ConfigError, match=rf"engine\.dtype='bfloat16'.*{method} factors the base"):
        build("llama", Peft(method=method), torch.bfloat16)


def test_settings_are_built_from_a_mapping():
    built = build_settings({"method": "ia3", "options": {"init_ia3_weights": False}}, "adapter", Peft)
    assert built == Peft(method="ia3", options={"init_ia3_weights": False})
    with pytest.raises(ConfigError, match=r"adapter\.metod"):
        build_settings({"metod": "ia3"}, "adapter", Peft)
