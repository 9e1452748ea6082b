"""LoRA's stated weight change against the weights that PEFT merges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from clients.adapters.initial.orthonormal import Orthonormal
from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.adapters.space import LowRank
from clients.cohort import Cohort
from fl.config import build as build_settings
from fl.errors import ConfigError
from tests.oracles.low_rank_cohort import build, vector
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
    cohort = build(family, LoRA(rank=3, alpha=5.0, rslora=rslora))
    state = vector(cohort)
    stated = {d.name: d for d in cohort.space.delta(state)}
    merged = merged_change(frozen(family), cohort, torch.from_numpy(state))
    assert len(merged) == len(stated) > 1
    for name, change in merged.items():
        low = stated[f"base_model.model.{name}"]
        assert isinstance(low, LowRank) and low.left.shape[1] == low.right.shape[0] == 3
        np.testing.assert_allclose(low.left @ low.right, change.numpy(), rtol=1e-10, atol=1e-12)
        assert change.norm() > 0.01


def test_patterns_set_rank_and_alpha_of_single_modules_as_peft_merges_them():
    adapter = LoRA(rank=3, alpha=5.0, rank_pattern={"query": 2}, alpha_pattern={"layer.1.attention.self.query": 7.0})
    cohort = build("bert", adapter)
    state = vector(cohort)
    merged = merged_change(frozen("bert"), cohort, torch.from_numpy(state))
    scales = {m.name: (m.rank, m.scale) for m in cohort.space.modules}
    assert sorted(scales.values()) == [(2, 5 / 2), (2, 7 / 2), (3, 5 / 3), (3, 5 / 3)]
    for low in cohort.space.delta(state):
        change = merged[low.name.removeprefix("base_model.model.")]
        np.testing.assert_allclose(low.left @ low.right, change.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_no_module_is_refused(name):
    with pytest.raises(ConfigError, match=rf"adapter\.{name}\.uery=2"):
        build("bert", LoRA(rank=3, **{name: {"uery": 2}}))


def test_delta_of_an_embedding_is_a_map_of_one_hot_tokens():
    cohort = build("llama", LoRA(rank=3, alpha=5.0, target_modules=["embed_tokens"]))
    state = vector(cohort)
    (low,) = cohort.space.delta(state)
    ((name, change),) = merged_change(frozen("llama"), cohort, torch.from_numpy(state)).items()
    assert low.name == f"base_model.model.{name}"
    np.testing.assert_allclose(low.left @ low.right, change.numpy(), rtol=1e-10, atol=1e-12)


def test_the_change_begins_at_zero():
    cohort = build("opt", LoRA(rank=3))
    deltas = list(cohort.space.delta(cohort.initial.numpy()))
    assert deltas and all(not d.left.any() and d.right.any() for d in deltas)


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    assert LoRA(rank=4, alpha=6.0).scalings == (1.5,)
    assert LoRA(rank=4, alpha=6.0, rslora=True).scalings == (3.0,)
    assert LoRA(rank=3, alpha=6.0, rslora=True).scalings == (6 / math.sqrt(3),)
    assert LoRA(rank=[4, 2], alpha=6.0).scalings == (1.5, 3.0)
    assert LoRA(rank=[4, 2], alpha=[6.0, 1.0]).scalings == (1.5, 0.5)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_of_the_server_is_the_one_that_peft_took(rslora):
    """Of the highest rank, the first such; bit for bit, so that the clients of full rank have no unit of their own."""
    for rank, alpha in (([2, 7, 7, 3], [1.0, 5.0, 9.0, 2.0]), ([3, 6], 7.3)):
        adapter = LoRA(rank=rank, alpha=alpha, rslora=rslora)
        cohort = build("bert", adapter)
        assert adapter.full == 1 and adapter.mixed_ranks
        for module in cohort.space.modules:
            assert (module.rank, module.scale) == (adapter.ranks[1], adapter.scalings[1])
        assert cohort.space.units(1) is None and cohort.space.units(0) is not None


def test_one_rank_is_no_mixture():
    for adapter in (LoRA(rank=[4]), LoRA(rank=[4, 4]), LoRA(rank=[4, 4], alpha=[3.0, 3.0]), LoRA(rank=4)):
        assert not adapter.mixed_ranks and not build("llama", adapter).space.mixed
    assert LoRA(rank=[4, 4], alpha=[3.0, 1.0]).mixed_ranks
    assert not build("llama", LoRA(rank=[4, 4], alpha=[3.0, 1.0])).space.mixed  # of one rank, in two scales


def test_dora_and_other_methods_state_no_factored_change():
    for adapter in (LoRA(rank=3, dora=True), Peft(method="vera", rank=5)):
        base, targets = tiny("llama")
        space = adapter.space(adapter.attach(base, targets, seed=1))
        assert adapter.form == "other" and not space.modules and not space.constant
        assert list(space.delta(np.zeros(space.layout.size))) == []
    assert LoRA(rank=3).form == "lora"


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
    [
        ("rank", 0),
        ("rank", 2.5),
        ("alpha", 0),
        ("dropout", 1.0),
        ("dora", "maybe"),
        ("layers", 3),
        ("ranks", 4),
        ("rank", []),
        ("rank", [4, 0]),
        ("rank", [4, "x"]),
        ("alpha", []),
        ("alpha", [1.0, 2.0]),
        ("alpha", [-1.0]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": -1.0}),
        ("rank_pattern", 3),
    ],
)
def test_wrong_settings_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{name}(\.q_proj)?="):
        build_settings({name: value}, "adapter", LoRA)


@pytest.mark.parametrize("more", [{"rank": [2, 4]}, {"init": Orthonormal()}], ids=str)
def test_dora_has_one_rank_and_the_plain_start(more):
    with pytest.raises(ConfigError, match=r"adapter\.dora=True"):
        LoRA(dora=True, **more)


def test_targets_that_the_model_has_not_are_refused():
    with pytest.raises(ConfigError, match="'LORA'.*PEFT refuses it on this model.*nothing_like_it"):
        build("llama", LoRA(rank=3, target_modules=["nothing_like_it"]))
