"""Which way each layer is stacked, and that the ways agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort, CohortBatch
from clients.stacked import Slots, StackedLayer, StackedLinear, StackedLoRA, stack_layer
from fl.errors import ConfigError
from tests.oracles.cohorts import ADAPTERS, apart, build, states
from tests.oracles.models import FAMILIES, batches, tiny

VMAP = ("dora", "vera", "miss", "ia3", "lokr")
# vmap refuses these: custom autograd functions (RandLoRA, LoHa), in-place index writes (OFT).
LOOP = ("loha", "oft", "randlora")


def ways(cohort: Cohort) -> set[str]:
    """How the adapted layers (the head aside) are computed."""
    return {
        ("loop" if layer.loop else "vmap") if isinstance(layer, StackedLayer) else "products"
        for _, attribute, layer in cohort.swaps
        if attribute != "classifier"
    }


def test_every_adapter_of_the_matrix_has_its_way_stated():
    assert {*VMAP, *LOOP, "lora", "rslora"} == set(ADAPTERS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "rslora"])
def test_lora_is_batched_products(family, adapter):
    assert ways(build(family, adapter)) == {"products"}


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
@pytest.mark.parametrize("adapter", [*VMAP, *LOOP])
def test_vmap_is_used_for_whatever_it_supports(family, adapter):
    cohort = build(family, adapter)
    cohort.gradients(states(cohort, 3), CohortBatch.of(batches(cohort.task, [2, 1, 2])))
    assert ways(cohort) == {"vmap" if adapter in VMAP else "loop"}


@pytest.mark.parametrize("adapter", ["dora", "vera", "ia3"])
def test_vmap_is_used_for_conv1d_too(adapter):
    assert ways(build("gpt2", adapter)) == {"vmap"}


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
@pytest.mark.parametrize("adapter", VMAP)
def test_the_loop_gives_what_vmap_gives(family, adapter):
    cohort = build(family, adapter)
    mine, batch = states(cohort, 3), CohortBatch.of(batches(cohort.task, [4, 1, 3]))
    losses, grads = cohort.gradients(mine, batch)
    for _, _, layer in cohort.swaps:
        if isinstance(layer, StackedLayer):
            layer.loop = True
    looped_losses, looped_grads = cohort.gradients(mine, batch)
    torch.testing.assert_close(looped_losses, losses, rtol=1e-10, atol=0)
    assert apart(looped_grads, grads) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batched_products_give_what_the_general_layer_gives(family):
    cohort = build(family)
    mine, batch = states(cohort, 3), CohortBatch.of(batches(cohort.task, [4, 1, 3]))
    _, grads = cohort.gradients(mine, batch)
    for parent, attribute, layer in cohort.swaps:
        setattr(parent, attribute, StackedLayer(layer.layer, layer.names, cohort.slots))
    _, general = cohort.gradients(mine, batch)
    assert ways(cohort) == {"products"}  # the swaps still name the products; the tree holds the general layers
    assert any(isinstance(m, StackedLayer) for m in cohort.model.modules())
    assert apart(grads, general) <= 1e-10


def test_adapter_dropout_sends_a_vmap_layer_to_the_loop_and_lora_not():
    assert ways(build("llama", Peft(method="vera", rank=5, options={"vera_dropout": 0.3}))) == {"loop"}
    assert ways(build("llama", LoRA(rank=3, dropout=0.3))) == {"products"}


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_lora_with_more_than_two_factors_is_not_taken_for_plain_lora(options):
    assert ways(build("bert", Peft(method="lora", rank=3, options=options))) == {"vmap"}


def linear(bias: bool) -> tuple[nn.Linear, Slots, StackedLinear]:
    layer = nn.Linear(5, 3, bias=bias).double()
    names = {n: f"head.{n}" for n, _ in layer.named_parameters()}
    slots = Slots(number=2)
    source = torch.Generator().manual_seed(0)
    slots.tensors = {
        f"head.{n}": torch.randn(2, *p.shape, generator=source, dtype=torch.float64)
        for n, p in layer.named_parameters()
    }
    stacked = stack_layer(layer, names, slots)
    assert isinstance(stacked, StackedLinear)
    return layer, slots, stacked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)], ids=["pooled", "tokens"])
def test_a_linear_layer_of_each_slot_sees_that_slots_rows(bias, shape):
    _, slots, stacked = linear(bias)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = stacked(x)
    for slot in range(2):
        weight = slots.tensors["head.weight"][slot]
        shift = slots.tensors["head.bias"][slot] if bias else 0
        torch.testing.assert_close(y[slot * 3 : slot * 3 + 3], x[slot * 3 : slot * 3 + 3] @ weight.T + shift)


def test_a_head_computes_in_its_own_precision():
    _, _, stacked = linear(True)
    assert stacked(torch.ones(4, 5, dtype=torch.bfloat16)).dtype == torch.float64


@pytest.mark.parametrize("adapter", ["lora", "vera", "randlora"])
def test_a_layer_may_see_tokens_flattened_into_rows(adapter):
    """Older models merge batch and tokens before their feed-forward layers."""
    cohort = build("llama", adapter)
    _, _, layer = cohort.swaps[0]
    cohort.slots.number = 2
    cohort.slots.tensors = cohort.layout.views(states(cohort, 2))
    x = torch.randn(6, 4, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(layer(x.reshape(24, 24)).reshape(6, 4, -1), layer(x), rtol=1e-12, atol=1e-12)


def test_embeddings_keep_the_precision_of_the_base():
    base, _ = tiny("llama", dtype=torch.bfloat16)
    adapter = Peft(method="lora", rank=3, options={"target_modules": ["embed_tokens"]})
    cohort = Cohort(adapter.attach(base, [], seed=1), base.task)
    cohort.slots.number, cohort.slots.tensors = 2, cohort.layout.views(states(cohort, 2).float())
    out = cohort.swaps[0][2](torch.arange(6).reshape(2, 3))
    assert out.dtype == torch.bfloat16 and out.float().std() > 0.001


class Failing(nn.Module):
    """A layer that fails inside vmap and outside with ``error``."""

    def __init__(self, error: Exception):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.error = error

    def forward(self, x):
        raise self.error


def test_running_out_of_memory_is_not_taken_for_a_refusal_of_vmap():
    slots = Slots(2, {"w": torch.zeros(2, 2)})
    layer = stack_layer(Failing(torch.OutOfMemoryError("full")), {"weight": "w"}, slots)
    with pytest.raises(torch.OutOfMemoryError):
        layer(torch.zeros(4, 2))
    assert isinstance(layer, StackedLayer) and not layer.loop


def test_what_fails_in_the_loop_too_is_raised():
    slots = Slots(2, {"w": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="broken"):
        stack_layer(Failing(ValueError("broken")), {"weight": "w"}, slots)(torch.zeros(4, 2))


def test_the_stacked_model_has_no_trainable_tensor_of_its_own():
    for adapter in ("lora", "vera", "randlora"):
        cohort = build("bert", adapter)
        assert not [n for n, p in cohort.model.named_parameters() if p.requires_grad]
        assert isinstance(cohort.swaps[0][2], StackedLoRA) == (adapter == "lora")


def test_layers_that_see_no_batch_are_refused():
    """Position embeddings get one row whatever the batch."""
    with pytest.raises(ConfigError, match="can't be trained in cohorts"):
        build("gpt2", Peft(method="lora", rank=3, options={"target_modules": ["wpe", "c_attn"]}))
