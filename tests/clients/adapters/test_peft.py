"""Any PEFT method by its name: its options, its defaults, what is refused."""

from __future__ import annotations

import pytest
import torch

from clients.adapters.base import Adapter
from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort, CohortBatch
from fl.config import build as build_settings
from fl.errors import ConfigError
from tests.oracles.cohorts import apart, build, states
from tests.oracles.models import FAMILIES, batches, tiny


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


@pytest.mark.parametrize("initial", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused_before_they_do(initial):
    base, targets = tiny("llama")
    frozen = [p.detach().clone() for p in base.module.parameters()]
    with pytest.raises(ConfigError, match=rf"adapter\.options\.init_lora_weights='{initial}'"):
        Peft(method="lora", options={"init_lora_weights": initial}).attach(base, targets, 1)
    assert all(torch.equal(a, b) for a, b in zip(frozen, base.module.parameters(), strict=True))


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
