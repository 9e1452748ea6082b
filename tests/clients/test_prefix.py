"""The frozen prefix: exact, really skipped, and refused where it can't be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort, CohortBatch
from clients.local.training import LocalTraining, Work
from clients.prefix import PrefixCache, first_adapted_layer
from clients.trainer import Plan, Trainer
from clients.worker import Worker
from tests.oracles.cohorts import apart, build, states
from tests.oracles.models import FAMILIES, token_set

LISTS = {"bert": "encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "opt": "decoder.layers"}
EXAMPLES = [np.array([3, 0, 8, 5]), np.array([7]), np.array([1, 2, 9])]


def top(family: str, layers: list[int], **options) -> Cohort:
    return build(family, LoRA(rank=3, layers=layers), layers=3, **options)


def cache_of(cohort: Cohort, batch: int = 4) -> PrefixCache:
    sets = {name: token_set(cohort.task, 10, seed) for seed, name in enumerate(("train", "test"))}
    cache = PrefixCache(cohort, sets, batch)
    cache.fill()
    return cache


def plain(cache: PrefixCache, name: str = "train") -> CohortBatch:
    return CohortBatch.of([cache.sets[name].batch(e) for e in EXAMPLES])


def laid(cache: PrefixCache, name: str = "train") -> CohortBatch:
    return cache.lay(name, plain(cache, name), EXAMPLES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[2], [1, 2], [1]], ids=str)
@pytest.mark.parametrize("name", ["train", "test"])
def test_losses_and_gradients_are_those_without_the_cache(family, layers, name):
    cohort = top(family, layers)
    cache, mine = cache_of(cohort), states(cohort, 3)
    assert cache.cut == layers[0]
    losses, grads = cohort.gradients(mine, plain(cache, name))
    cached_losses, cached_grads = cohort.gradients(mine, laid(cache, name))
    torch.testing.assert_close(cached_losses, losses, rtol=1e-12, atol=0)
    assert apart(cached_grads, grads) <= 1e-12
    split = cohort.gradients(mine, laid(cache, name), accumulate=2)
    assert apart(split[1], grads) <= 1e-12
    _, samples = cohort.sample_gradients(mine, laid(cache, name))
    assert apart((samples * laid(cache).weights[..., None]).sum(1), grads) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_below_do_no_work_and_those_above_do(family):
    cohort = top(family, [1])
    cache, worked = cache_of(cohort), []
    (path,) = {p for p, m in cohort.model.named_modules() if p.endswith(LISTS[family]) and len(m) == 3}
    for index, layer in enumerate(cohort.model.get_submodule(path)):
        norm = next(m for n, m in layer.named_modules() if "norm" in n.lower() or n.startswith("ln_"))
        norm.register_forward_hook(lambda *_, index=index: worked.append(index))
    cohort.gradients(states(cohort, 3), laid(cache))
    assert set(worked) == {1, 2}
    cohort.gradients(states(cohort, 3), plain(cache))
    assert set(worked) == {0, 1, 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_gives_the_model_its_own_passes_back(family):
    cohort = top(family, [2])
    before = cohort.gradients(states(cohort, 3), plain(cache := cache_of(cohort)))
    cache.remove()
    assert not any("forward" in vars(m) for m in cohort.model.modules())
    assert not any(m._forward_pre_hooks for m in cohort.model.modules())
    # A laid prefix has no effect any more.
    wrong = laid(cache)
    wrong.prefix += 1
    after = cohort.gradients(states(cohort, 3), wrong)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_model_is_whole_after_a_pass_with_the_cache(family):
    cohort = top(family, [2])
    cache, state = cache_of(cohort), states(cohort, 1)
    batch = plain(cache)
    with torch.no_grad():
        expected = cohort.logits(cohort.layout.views(state.repeat(3, 1)), batch)[0]
        cohort.losses(state.repeat(3, 1), laid(cache))
        model = cohort.unstacked(state[0])
        found = model(input_ids=batch.input_ids[0], attention_mask=batch.attention_mask[0]).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_what_is_kept_does_not_depend_on_how_it_was_filled(batch):
    cohort = top("llama", [2])
    kept, other = cache_of(cohort), cache_of(top("llama", [2]), batch)
    for name in ("train", "test"):
        torch.testing.assert_close(other.rows[name], kept.rows[name], rtol=1e-12, atol=1e-12)


def test_memory_is_tokens_times_hidden_size_times_the_bytes_of_a_scalar():
    for dtype, size in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)):
        cache = cache_of(top("bert", [2], dtype=dtype))
        tokens = sum(int(d.lengths.sum()) for d in cache.sets.values())
        assert cache.bytes_needed() == tokens * 24 * size
        assert sum(r.numel() * r.element_size() for r in cache.rows.values()) == cache.bytes_needed()


def test_only_the_samples_own_tokens_are_laid():
    cache = cache_of(top("llama", [2]))
    batch = laid(cache)
    real = torch.zeros_like(batch.attention_mask)
    for slot, examples in enumerate(EXAMPLES):
        for row, example in enumerate(examples):
            real[slot, row, : cache.sets["train"].lengths[example]] = 1
    assert (batch.prefix[real == 0] == 0).all() and (batch.prefix[real == 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(rank=3),
        LoRA(rank=3, layers=[0, 2]),
        Peft(method="lora", rank=3, options={"target_modules": ["embed_tokens"], "layers_to_transform": None}),
        Peft(method="lora", rank=3, options={"target_modules": r"model.embed_tokens|.*layers\.2\..*q_proj"}),
        Peft(method="lora", rank=3, options={"target_modules": r".*layers\.2\..*q_proj", "modules_to_save": ["norm"]}),
    ],
    ids=["all layers", "the first layer", "embeddings", "embeddings and the top", "a module after the layers"],
)
def test_nothing_is_skipped_where_something_below_trains(adapter):
    cohort = build("llama", adapter, layers=3)
    assert first_adapted_layer(cohort) == (None, 0)
    with pytest.raises(ValueError, match="nothing to cache"):
        PrefixCache(cohort, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_adapted_layer_is_found(family):
    layers, cut = first_adapted_layer(top(family, [1, 2]))
    assert cut == 1 and len(layers) == 3


def test_a_trained_output_layer_comes_after_the_layers():
    adapter = Peft(method="lora", rank=3, options={"target_modules": r"lm_head|.*layers\.2\..*q_proj"})
    assert first_adapted_layer(build("llama", adapter, layers=3))[1] == 2


def test_training_and_evaluation_with_the_cache_are_those_without():
    results = []
    for cached in (True, False):
        cohort = top("bert", [2], dtype=torch.float32)
        cache = cache_of(cohort)
        if not cached:
            cache.remove()
        local = LocalTraining(steps=3, batch_size=4, lr=0.01)
        worker = Worker(cohort, cache.sets, local, 0, cache if cached else None)
        trainer, start = Trainer(worker, Plan(cohort_size=2)), cohort.initial.numpy()
        fits = trainer.train([Work(c, 1, start, local.batches(0, c, 1, np.arange(9)), 0.01) for c in range(3)])
        scores = trainer.evaluate(fits[0].state, "test", np.arange(10), 4)
        results.append((np.stack([f.state for f in fits]), scores.loss))
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_hidden_states_that_are_known_are_not_computed_again():
    """Runs of one process share them (`fl.experiment.Shared`): the same tensors, and no pass through the model."""
    cache, known = cache_of(top("bert", [2])), {}
    cache.fill(known)
    assert known.keys() == cache.sets.keys()
    first = {name: rows.clone() for name, rows in known.items()}
    cache._hidden = lambda *_: pytest.fail("a pass through the frozen layers")
    cache.fill(known)
    assert cache.rows is known
    assert all(torch.equal(known[name], first[name]) for name in first)
