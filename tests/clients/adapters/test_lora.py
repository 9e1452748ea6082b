"""LoRA's stated weight change against the weights that PEFT merges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clients.adapters.base import LowRank
from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort
from fl.config import build as build_settings
from fl.errors import ConfigError
from tests.oracles.cohorts import build, states
from tests.oracles.models import FAMILIES, tiny


def merged_change(frozen: nn.Module, cohort: Cohort, state: torch.Tensor) -> dict[str, torch.Tensor]:
    """Merged minus ``frozen`` weight of each module that changes, as a map ``(out, in)``."""
    merged, found = cohort.unstacked(state).merge_and_unload(), {}
    for name, module in merged.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and name != "classifier":
            change = module.weight.detach() - frozen.get_submodule(name).weight
            # Conv1D and embeddings store their weights (in, out).
            found[name] = change if isinstance(module, nn.Linear) else change.T
    return {name: change for name, change in found.items() if change.any()}


def frozen(family: str) -> nn.Module:
    return tiny(family, dtype=torch.float64)[0].module


@pytest.mark.parametrize("family", FAMILIES)  # GPT-2's Conv1D keeps its weight transposed
@pytest.mark.parametrize("rslora", [False, True])
def test_delta_is_the_difference_of_the_merged_weights(family, rslora):
    adapter = LoRA(rank=3, alpha=5.0, rslora=rslora)
    cohort = build(family, adapter)
    state = states(cohort, 1)[0]
    stated = {d.name: d for d in adapter.delta(cohort.model, cohort.layout.views(state))}
    merged = merged_change(frozen(family), cohort, state)
    assert len(merged) == len(stated) > 1
    for name, change in merged.items():
        low = stated[f"base_model.model.{name}"]
        assert isinstance(low, LowRank) and low.left.shape[1] == low.right.shape[0] == 3
        torch.testing.assert_close(low.left @ low.right, change, rtol=1e-10, atol=1e-12)
        assert change.norm() > 0.01


def test_delta_of_an_embedding_is_a_map_of_one_hot_tokens():
    adapter = LoRA(rank=3, alpha=5.0, target_modules=["embed_tokens"])
    cohort = build("llama", adapter)
    state = states(cohort, 1)[0]
    (low,) = adapter.delta(cohort.model, cohort.layout.views(state))
    ((name, change),) = merged_change(frozen("llama"), cohort, state).items()
    assert low.name == f"base_model.model.{name}"
    torch.testing.assert_close(low.left @ low.right, change, rtol=1e-10, atol=1e-12)


def test_the_change_begins_at_zero():
    adapter = LoRA(rank=3)
    cohort = build("opt", adapter)
    deltas = list(adapter.delta(cohort.model, cohort.layout.views(cohort.initial)))
    assert all(not d.left.any() and d.right.any() for d in deltas)


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    assert LoRA(rank=4, alpha=6.0).scaling == 1.5
    assert LoRA(rank=4, alpha=6.0, rslora=True).scaling == 3.0
    assert LoRA(rank=3, alpha=6.0, rslora=True).scaling == 6 / math.sqrt(3)


def test_dora_and_other_methods_state_no_factored_change():
    cohort = build("llama", LoRA(rank=3, dora=True))
    with pytest.raises(TypeError, match="not a product of two factors"):
        list(LoRA(rank=3, dora=True).delta(cohort.model, cohort.layout.views(cohort.initial)))
    with pytest.raises(TypeError, match="Peft does not state its weight change"):
        list(Peft().delta(cohort.model, {}))


@pytest.mark.parametrize("layers", [[2], [0, 1]], ids=str)
def test_only_the_layers_asked_for_are_adapted(layers):
    cohort = build("llama", LoRA(rank=3, layers=layers), layers=3)
    assert {int(n.split(".layers.")[1].split(".")[0]) for n in cohort.layout.names} == set(layers)


@pytest.mark.parametrize("layers", [[3], [1, 7], [-1]], ids=str)
def test_a_layer_that_is_not_there_is_refused(layers):
    with pytest.raises(ConfigError, match="adapter"):
        build("llama", LoRA(rank=3, layers=layers), layers=3)


def test_a_classifier_trains_its_head_and_a_language_model_has_none():
    bert = build("bert", LoRA(rank=3))
    llama = build("llama", LoRA(rank=3))
    assert [n.rsplit(".", 1)[1] for n in bert.layout.names if "classifier" in n] == ["weight", "bias"]
    assert all(".lora_" in n for n in llama.layout.names)


def test_the_initial_state_comes_from_the_seed_alone():
    def initial(seed: int, noise: int) -> torch.Tensor:
        base, targets = tiny("bert")
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        found = Cohort(LoRA(rank=3).attach(base, targets, seed), base.task).initial
        assert torch.equal(torch.get_rng_state(), before)
        return found

    assert torch.equal(initial(1, 0), initial(1, 5))
    assert not torch.equal(initial(1, 0), initial(2, 0))


def test_the_base_is_left_as_it_is():
    base, targets = tiny("llama")
    frozen = [p.detach().clone() for p in base.module.parameters()]
    model = LoRA(rank=3).attach(base, targets, seed=1)
    kept = [p for n, p in model.named_parameters() if ".lora_" not in n]
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(frozen, kept, strict=True))
    assert not model.training and model.peft_config["default"].base_model_name_or_path == "tiny-llama"


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("rank", 2.5), ("alpha", 0), ("dropout", 1.0), ("dora", "maybe"), ("layers", 3), ("ranks", 4)],
)
def test_wrong_settings_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{name}="):
        build_settings({name: value}, "adapter", LoRA)


def test_targets_that_the_model_has_not_are_refused():
    with pytest.raises(ConfigError, match="'LORA'.*PEFT refuses it on this model.*nothing_like_it"):
        build("llama", LoRA(rank=3, target_modules=["nothing_like_it"]))
