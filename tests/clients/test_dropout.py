"""Dropout by keys: the same masks for any cohort, padding, accumulation and order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clients.adapters.base import Adapter
from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort, CohortBatch
from clients.dropout import DropoutKeys, FunctionalDropout, KeyedDropout, drop, install
from clients.stacked import Slots, StackedLayer
from tests.oracles import peft_loop
from tests.oracles.cohorts import apart, build, states
from tests.oracles.models import batches, token_set

KEYS = [(7, client, 2, 0) for client in range(3)]
# Hidden dropout of the three families that have one (OPT's is functional), and adapters' own by either way.
CASES: dict[str, tuple[str, Adapter, float]] = {
    "bert hidden": ("bert", LoRA(rank=3), 0.2),
    "gpt2 hidden": ("gpt2", LoRA(rank=3), 0.2),
    "opt hidden": ("opt", LoRA(rank=3), 0.2),
    "llama lora": ("llama", LoRA(rank=3, dropout=0.3), 0.0),
    "llama vera": ("llama", Peft(method="vera", rank=5, options={"vera_dropout": 0.3}), 0.0),
    "opt hidden, vera": ("opt", Peft(method="vera", rank=5), 0.2),
    "opt hidden, dora": ("opt", LoRA(rank=3, dropout=0.3, dora=True), 0.2),
}


@pytest.fixture(scope="module", params=CASES)
def cohort(request) -> Cohort:
    family, adapter, dropout = CASES[request.param]
    built = build(family, adapter, dropout=dropout)
    assert built.has_dropout
    return built


def of(data, keys=None) -> CohortBatch:
    return CohortBatch.of(data, KEYS[: len(data)] if keys is None else keys)


def test_masks_do_not_depend_on_the_other_slots(cohort):
    mine, data = states(cohort, 3), batches(cohort.task, [4, 1, 3])
    losses, grads = cohort.gradients(mine, of(data))
    for slot in range(3):
        loss, grad = cohort.gradients(mine[slot : slot + 1], of([data[slot]], [KEYS[slot]]))
        assert losses[slot].item() == pytest.approx(loss.item(), rel=1e-10)
        assert apart(grads[slot], grad[0]) <= 1e-10


def test_masks_do_not_depend_on_the_padding(cohort):
    mine, data = states(cohort, 3), batches(cohort.task, [2, 3])
    wide = token_set(cohort.task, 5, seed=1, shortest=11, longest=12).batch(np.arange(5))
    _, small = cohort.gradients(mine[:2], of(data))
    _, padded = cohort.gradients(mine, of([*data, wide]))
    assert apart(padded[:2], small) <= 1e-10


def test_masks_do_not_depend_on_the_order_of_the_slots(cohort):
    mine, data = states(cohort, 3), batches(cohort.task, [4, 1, 3])
    _, grads = cohort.gradients(mine, of(data))
    _, reverse = cohort.gradients(mine.flip(0), of(data[::-1], KEYS[::-1]))
    assert apart(reverse.flip(0), grads) <= 1e-10


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_masks_do_not_depend_on_accumulation(cohort, parts):
    mine, batch = states(cohort, 3), of(batches(cohort.task, [4, 1, 3]))
    losses, grads = cohort.gradients(mine, batch)
    split_losses, split_grads = cohort.gradients(mine, batch, accumulate=parts)
    torch.testing.assert_close(split_losses, losses, rtol=1e-10, atol=0)
    assert apart(split_grads, grads) <= 1e-10


def test_sample_gradients_have_the_masks_of_the_batch(cohort):
    mine, batch = states(cohort, 3), of(batches(cohort.task, [4, 1, 3]))
    _, grads = cohort.gradients(mine, batch)
    _, sample_grads = cohort.sample_gradients(mine, batch)
    assert apart((sample_grads * batch.weights[..., None]).sum(1), grads) <= 1e-10


def test_the_stacked_layers_drop_what_the_plain_peft_model_drops(cohort):
    """The plain model, under the same keys, one client at a time."""
    mine, data = states(cohort, 3), batches(cohort.task, [3, 3, 3])
    batch = of(data)
    with torch.no_grad():
        logits = cohort.logits(cohort.layout.views(mine), batch)
        for slot in range(3):
            plain, lengths = cohort.unstacked(mine[slot]), batch.attention_mask[slot].sum(-1)
            cohort.slots.dropout = DropoutKeys.of([KEYS[slot]], [3], [0], lengths[None], batch.input_ids.shape[2])
            with FunctionalDropout(cohort.slots):
                alone = plain(input_ids=batch.input_ids[slot], attention_mask=batch.attention_mask[slot]).logits
            cohort.slots.dropout = DropoutKeys()
            cohort.restack()
            real = batch.attention_mask[slot].bool() if cohort.task == "causal_lm" else slice(None)
            torch.testing.assert_close(logits[slot][real], alone[real], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("place", range(4), ids=["seed", "client", "round", "step"])
def test_every_part_of_the_key_changes_the_masks(cohort, place):
    mine, data = states(cohort, 1), batches(cohort.task, [3])
    other = tuple(part + (i == place) for i, part in enumerate(KEYS[0]))
    loss, _ = cohort.gradients(mine, of(data))
    again, _ = cohort.gradients(mine, of(data))
    changed, _ = cohort.gradients(mine, of(data, [other]))
    assert loss.item() == again.item() != changed.item()


def test_samples_of_one_batch_have_masks_of_their_own(cohort):
    data = token_set(cohort.task, 1).batch(np.zeros(3, dtype=np.int64))  # one sample three times
    with torch.no_grad():
        losses = cohort.sample_losses(cohort.layout.views(states(cohort, 1)), of([data]))
    assert len(set(losses[0].tolist())) == 3


def test_evaluation_drops_nothing(cohort):
    mine, data = states(cohort, 2), batches(cohort.task, [2, 3])
    calm, _ = cohort.gradients(mine, CohortBatch.of(data))
    dropped, _ = cohort.gradients(mine, of(data))
    assert (calm - dropped).abs().min() > 1e-6
    for slot, batch in enumerate(data):
        model = cohort.unstacked(mine[slot])
        loss, _ = peft_loop.gradient(model, cohort.layout, mine[slot], batch, list(range(len(batch))))
        cohort.restack()
        assert calm[slot].item() == pytest.approx(loss, rel=1e-9)


def test_a_slot_without_a_key_drops_nothing(cohort):
    mine, data = states(cohort, 2), batches(cohort.task, [2, 3])
    calm, _ = cohort.gradients(mine, CohortBatch.of(data))
    mixed, _ = cohort.gradients(mine, of(data, [None, KEYS[1]]))
    assert mixed[0].item() == pytest.approx(calm[0].item(), rel=1e-10)
    assert mixed[1].item() != pytest.approx(calm[1].item(), rel=1e-6)


def test_adapter_dropout_in_a_layer_for_vmap_goes_through_the_loop():
    family, adapter, _ = CASES["llama vera"]
    layers = [layer for _, _, layer in build(family, adapter).swaps]
    assert all(isinstance(layer, StackedLayer) and layer.loop for layer in layers)


def test_no_dropout_is_no_dropout():
    for family in ("bert", "gpt2", "llama", "opt"):
        cohort = build(family)
        assert not cohort.has_dropout and cohort.functional is None
        mine, data = states(cohort, 2), batches(cohort.task, [2, 3])
        assert torch.equal(cohort.gradients(mine, of(data))[1], cohort.gradients(mine, CohortBatch.of(data))[1])


def keys(rows: int, width: int, lengths: list[int] | None = None, slots: int = 1) -> DropoutKeys:
    each = torch.tensor(lengths or [width] * rows).reshape(slots, -1)
    return DropoutKeys.of([(1, s) for s in range(slots)], [rows // slots] * slots, [0] * slots, each, width)


def test_values_are_kept_at_the_expected_rate_and_scaled_to_the_same_mean():
    p, x = 0.3, torch.ones(8, 50, 40, dtype=torch.float64)
    y = drop(x, p, keys(8, 50))
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert abs((y > 0).double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.numel())


def test_masks_of_layers_tokens_and_samples_differ():
    x, source = torch.ones(2, 6, 40), keys(2, 6)
    first, second = drop(x, 0.5, source), drop(x, 0.5, source)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0, 0], first[0, 1])


def test_the_gradient_is_the_mask():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    drop(x, 0.25, keys(2, 3)).sum().backward()
    mask = drop(torch.ones(2, 3, 4, dtype=torch.float64), 0.25, keys(2, 3))
    assert torch.equal(x.grad, mask)


def test_p_zero_and_no_keys_are_the_identity():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert drop(x, 0.0, keys(2, 3)) is x and drop(x, 0.9, DropoutKeys()) is x


def test_padding_draws_nothing_and_is_zeroed():
    x, rows = torch.ones(2, 6, 30), keys(2, 6, [4, 6])
    y, short = drop(x, 0.5, rows), drop(x[:1, :4], 0.5, keys(1, 4))
    assert torch.equal(y[0, :4], short[0]) and y[0, 4:].abs().max() == 0
    # The next layer's mask is the same too: the padding took nothing from the generator.
    again, short = drop(x, 0.5, rows), drop(x[:1, :4], 0.5, keys(1, 4))
    assert not torch.equal(again[0, :4], short[0])


def test_a_pooled_vector_is_dropped_whole_and_flattened_tokens_as_tokens():
    pooled = drop(torch.ones(3, 40), 0.5, keys(3, 6))
    assert 0 < (pooled == 0).double().mean() < 1
    tokens = drop(torch.ones(3, 6, 40), 0.5, keys(3, 6, [6, 4, 5]))
    assert torch.equal(drop(torch.ones(18, 40), 0.5, keys(3, 6, [6, 4, 5])), tokens.reshape(18, 40))


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (4, 6, 8), (3, 7, 8), (5, 8)], ids=str)
def test_a_tensor_whose_tokens_can_not_be_told_is_refused(shape):
    with pytest.raises(ValueError, match="in a batch of 3 samples and 6 tokens"):
        drop(torch.ones(shape), 0.5, keys(3, 6))


def test_only_gives_the_rows_of_one_slot_and_ends_even_after_an_error():
    x, source = torch.ones(6, 4, 20), keys(6, 4, slots=3)
    whole = drop(x, 0.5, keys(6, 4, slots=3))
    for slot in range(3):
        with source.only(slot):
            assert torch.equal(drop(x[:2], 0.5, source), whole[2 * slot : 2 * slot + 2])
    with pytest.raises(RuntimeError), source.only(1):
        raise RuntimeError
    assert source.rows is None and source.first == 0


def test_functional_dropout_is_keyed_whatever_its_training_flag():
    holder = Slots(dropout=keys(2, 3))
    x = torch.ones(2, 3, 40)
    with FunctionalDropout(holder) as mode:
        assert F.dropout(x, 0.0, training=True) is x and not mode.found
        y = F.dropout(x, p=0.5, training=False)
        assert torch.equal(F.relu(-x), torch.zeros_like(x))  # all else is as it was
    assert mode.found and torch.equal(y, drop(x, 0.5, keys(2, 3)))
    assert F.dropout(x, p=0.5, training=False) is x


def test_install_replaces_every_dropout_and_counts_those_that_drop():
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2), nn.Dropout(0.3)))
    assert install(model, Slots()) == 2
    assert [m.p for m in model.modules() if isinstance(m, KeyedDropout)] == [0.1, 0.0, 0.3]
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())
