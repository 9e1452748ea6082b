"""Models and adapters whose samples or slots would see one another are refused before training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort
from clients.models import Base
from fl.errors import ConfigError
from fl.keys import seeded_globals
from tests.oracles.cohorts import ADAPTERS, build
from tests.oracles.models import FAMILIES


class Toy(nn.Module):
    """Embeds, adapts with ``inner``, mixes the batch by ``mix``, and classifies the mean token."""

    def __init__(self, mix):
        super().__init__()
        self.embed, self.inner, self.classifier = nn.Embedding(16, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.mix = mix

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        hidden = self.mix(self.inner, self.embed(input_ids))
        return SimpleNamespace(logits=self.classifier(hidden.mean(1)))


def by_itself(layer, x):
    return layer(x)


def batch_mean(layer, x):
    return layer(x) - layer(x).mean((0, 1))


def tokens_first(layer, x):
    return layer(x.transpose(0, 1)).transpose(0, 1)


def expert_for_some(layer, x):
    """As a mixture of experts: the layer gets the tokens that a router sends it, whoever's they are."""
    rows = x.reshape(-1, x.shape[-1])
    picked = rows[:, 0] > 0
    out = torch.zeros(len(rows), 7, dtype=x.dtype)
    out[picked] = layer(rows[picked])
    return out.reshape(*x.shape[:2], 7)


def cohort_of(mix, adapter=None) -> Cohort:
    with seeded_globals(3, "toy"):
        module = Toy(mix).requires_grad_(False)
    base = Base(module, None, "classification", "classifier", "toy", "toy")
    return Cohort((adapter or LoRA(rank=2)).attach(base, ["inner"], seed=1), base.task)


def test_a_model_of_independent_samples_is_taken():
    assert cohort_of(by_itself).layout.size > 0


@pytest.mark.parametrize("mix", [batch_mean, tokens_first, expert_for_some], ids=lambda f: f.__name__)
@pytest.mark.parametrize("adapter", [LoRA(rank=2), Peft(method="vera", rank=2)], ids=["products", "vmap"])
def test_a_model_that_mixes_its_batch_is_refused(mix, adapter):
    with pytest.raises(ConfigError, match="can't be trained in cohorts") as error:
        cohort_of(mix, adapter)
    assert error.value.key == "adapter" and error.value.exit_code == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_averages_over_the_batch_is_refused_in_either_precision(dtype):
    with pytest.raises(ConfigError, match="'LILY'.*depends on the other samples"):
        build("llama", Peft(method="lily"), dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["lora", "vera", "randlora"])
def test_no_exact_pair_is_refused_for_its_rounding(family, dtype, adapter):
    build(family, adapter, dtype, dropout=0.2)
    assert ADAPTERS[adapter]


def test_gradient_hooks_are_refused():
    with pytest.raises(ConfigError, match="'OSF'.*hooks"):
        build("llama", Peft(method="osf"))


def test_an_adapter_that_needs_more_inputs_is_refused_with_its_own_words():
    with pytest.raises(ConfigError, match="'POLY'.*task_ids should not be None"):
        build("llama", Peft(method="poly"))


def test_running_out_of_memory_is_not_a_wrong_setting(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        cohort_of(full)
