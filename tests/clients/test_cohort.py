"""The cohort against its slow twin: one client at a time with plain PEFT, one sample at a time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from clients.adapters.lora import LoRA
from clients.adapters.peft import Peft
from clients.cohort import Cohort, CohortBatch, causal_loss
from clients.data.batch import Batch
from clients.models import Base
from fl.errors import ConfigError
from fl.keys import seeded_globals
from tests.oracles.cohorts import ADAPTERS, apart, build, expect, states
from tests.oracles.models import FAMILIES, VOCABULARY, batches, tiny, token_set

# What PEFT itself refuses, with its reason; a change of PEFT that lifts one is noticed by the test below.
REFUSED = {("gpt2", adapter): "Conv1D" for adapter in ("miss", "lokr", "loha", "oft")}
PAIRS = [(f, a) for f in FAMILIES for a in ADAPTERS]

# The settings that PEFT's further methods need on models this small.
OPTIONS: dict[str, Peft] = {
    "ADALORA": Peft(method="ADALORA", options={"total_step": 10}),
    "BOFT": Peft(method="BOFT", options={"boft_block_size": 4}),
    "C3A": Peft(method="C3A", options={"block_size": 4}),
    "FOURIERFT": Peft(method="FOURIERFT", options={"n_frequency": 10}),
    "GRALORA": Peft(method="GRALORA", options={"r": 4, "gralora_k": 2}),
    "HRA": Peft(method="HRA", rank=4),
    "LN_TUNING": Peft(method="LN_TUNING", target_modules=["LayerNorm", "input_layernorm"]),
    "PSOFT": Peft(method="PSOFT", rank=4),
    "ROAD": Peft(method="ROAD", options={"group_size": 4}),
    "SHIRA": Peft(method="SHIRA", rank=2),
    "TRAINABLE_TOKENS": Peft(method="TRAINABLE_TOKENS", options={"token_indices": [3, 4, 5, 6, 7]}),
    "VBLORA": Peft(method="VBLORA", options={"num_vectors": 16, "vector_length": 4, "r": 2, "topk": 2}),
    "WAVEFT": Peft(method="WAVEFT", options={"n_frequency": 12}),
}
FURTHER = sorted(k.value for k in PEFT_TYPE_TO_CONFIG_MAPPING if k.value.lower() not in ADAPTERS)
PROMPTS = ("CARTRIDGE", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
NO_COHORT = {
    **dict.fromkeys(PROMPTS, "prompt learning"),
    "ADAPTION_PROMPT": "PEFT refuses|train a head",
    "CPT": "CPTConfig",
    "LILY": "depends on the other samples",
    "OSF": "hooks",
    "POLY": "task_ids",
    "SHADOW": "inside PEFT layers",
    "XLORA": "XLORA",
}


def test_losses_of_every_slot_and_their_gradients_are_checked_by_a_real_model():
    """The twin itself is right: its gradient is the slope of its loss."""
    cohort = build("bert")
    state, batch = states(cohort, 1)[0], batches(cohort.task, [3])[0]
    direction = torch.randn(cohort.layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up, _ = expect(cohort, state + 1e-6 * direction, batch)
    down, _ = expect(cohort, state - 1e-6 * direction, batch)
    _, gradient = expect(cohort, state, batch)
    assert (up - down) / 2e-6 == pytest.approx(float(gradient @ direction), rel=1e-6)


@pytest.mark.parametrize(("family", "adapter"), PAIRS)
def test_gradients_are_those_of_a_client_alone(family, adapter):
    if (family, adapter) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[family, adapter]):
            build(family, adapter)
        return
    cohort = build(family, adapter)
    mine, data = states(cohort, 3), batches(cohort.task, [4, 1, 3])
    losses, grads = cohort.gradients(mine, CohortBatch.of(data))
    for slot, batch in enumerate(data):
        loss, gradient = expect(cohort, mine[slot], batch)
        assert losses[slot].item() == pytest.approx(loss, rel=1e-9)
        assert apart(grads[slot], gradient) <= 1e-9
        assert gradient.norm() > 1e-4
    torch.testing.assert_close(cohort.losses(mine, CohortBatch.of(data)), losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("family", "adapter"), [p for p in PAIRS if p not in REFUSED])
def test_sample_gradients_are_those_of_a_batch_of_one(family, adapter):
    cohort = build(family, adapter)
    mine, data = states(cohort, 2), batches(cohort.task, [3, 2])
    losses, grads = cohort.sample_gradients(mine, CohortBatch.of(data))
    for slot, batch in enumerate(data):
        for row in range(len(batch)):
            loss, gradient = expect(cohort, mine[slot], batch, [row])
            assert losses[slot, row].item() == pytest.approx(loss, rel=1e-9)
            assert apart(grads[slot, row], gradient) <= 1e-9
    assert grads[1, 2].abs().max() == 0  # the padding sample of the smaller slot


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", FURTHER)
def test_every_other_method_of_peft_is_exact_or_refused(family, method, capfd):
    """VB-LoRA, UniLoRA and TinyLoRA among them, whose tensors are shared between layers."""
    if method in NO_COHORT or (family, method) == ("bert", "TRAINABLE_TOKENS"):
        with pytest.raises(ConfigError, match=NO_COHORT.get(method, "train a head")):
            build(family, OPTIONS.get(method, Peft(method=method)))
        return
    cohort = build(family, OPTIONS.get(method, Peft(method=method)))
    mine, data = states(cohort, 3), batches(cohort.task, [4, 1, 3])
    losses, grads = cohort.gradients(mine, CohortBatch.of(data))
    for slot, batch in enumerate(data):
        loss, gradient = expect(cohort, mine[slot], batch)
        # C3A, DEFT and FourierFT compute in float32 whatever they are given.
        assert losses[slot].item() == pytest.approx(loss, rel=1e-7)
        assert (grads[slot] - gradient).norm() <= 1e-6 * gradient.norm()


def test_adapters_of_several_kinds_in_one_model_are_exact():
    """LoRA on linear layers and on embeddings, a second head as a whole module, all in one configuration."""
    adapter = Peft(method="lora", rank=3, options={"target_modules": ["query", "word_embeddings", "pooler.dense"]})
    cohort = build("bert", adapter)
    kinds = {type(stacked).__name__ for _, _, stacked in cohort.swaps}
    assert kinds == {"StackedLoRA", "StackedLayer", "StackedLinear"}
    mine, data = states(cohort, 3), batches(cohort.task, [4, 1, 3])
    _, grads = cohort.gradients(mine, CohortBatch.of(data))
    for slot, batch in enumerate(data):
        assert apart(grads[slot], expect(cohort, mine[slot], batch)[1]) <= 1e-9


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}),
        ("gpt2", {"target_modules": ["wte", "c_attn"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "+".join(map(str, v.values())),
)
def test_embeddings_output_layers_and_whole_modules_are_exact(family, options):
    cohort = build(family, Peft(method="lora", rank=3, options=options))
    mine, data = states(cohort, 2), batches(cohort.task, [2, 3])
    _, grads = cohort.gradients(mine, CohortBatch.of(data))
    for slot, batch in enumerate(data):
        assert apart(grads[slot], expect(cohort, mine[slot], batch)[1]) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_together_give_what_each_gives_alone(family):
    cohort = build(family)
    mine, data = states(cohort, 3), batches(cohort.task, [4, 1, 3])
    losses, grads = cohort.gradients(mine, CohortBatch.of(data))
    for slot in range(3):
        loss, grad = cohort.gradients(mine[slot : slot + 1], CohortBatch.of([data[slot]]))
        assert losses[slot].item() == pytest.approx(loss.item(), rel=1e-10)
        assert apart(grads[slot], grad[0]) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "vera", "randlora"])  # products, vmap, loop
def test_what_one_slot_holds_changes_no_bit_of_the_others(family, adapter):
    cohort = build(family, adapter, dtype=torch.float32)
    mine, data = states(cohort, 3).float(), batches(cohort.task, [4, 4, 3])
    _, before = cohort.gradients(mine, CohortBatch.of(data))
    changed = mine.clone()
    changed[1] = states(cohort, 1, seed=9).float()[0]
    other = [data[0], Batch(data[1].input_ids.roll(1, 0), data[1].attention_mask.roll(1, 0), data[1].labels), data[2]]
    _, after = cohort.gradients(changed, CohortBatch.of(other))
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_changes_nothing(family):
    cohort = build(family)
    mine, data = states(cohort, 2), batches(cohort.task, [3, 2])
    small = cohort.gradients(mine, CohortBatch.of(data))
    wide = token_set(cohort.task, 5, seed=1, shortest=11, longest=12).batch(np.arange(5))
    width = max(b.input_ids.shape[1] for b in data)
    padded = CohortBatch.of([*data, wide])
    assert padded.input_ids.shape[2] > width and padded.input_ids.shape[1] == 5
    losses, grads = cohort.gradients(torch.cat([mine, mine[:1]]), padded)
    torch.testing.assert_close(losses[:2], small[0], rtol=1e-10, atol=0)
    assert apart(grads[:2], small[1]) <= 1e-10


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_accumulated_parts_add_up_to_the_whole_batch(family, parts):
    cohort = build(family)
    mine, batch = states(cohort, 3), CohortBatch.of(batches(cohort.task, [4, 1, 3]))
    losses, grads = cohort.gradients(mine, batch)
    split_losses, split_grads = cohort.gradients(mine, batch, accumulate=parts)
    torch.testing.assert_close(split_losses, losses, rtol=1e-12, atol=0)
    assert apart(split_grads, grads) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weighted_mean_of_sample_gradients_is_the_gradient(family):
    cohort = build(family)
    mine, batch = states(cohort, 3), CohortBatch.of(batches(cohort.task, [4, 1, 3]))
    _, grads = cohort.gradients(mine, batch)
    sample_losses, sample_grads = cohort.sample_gradients(mine, batch)
    assert apart((sample_grads * batch.weights[..., None]).sum(1), grads) <= 1e-10
    assert sample_losses.shape == (3, 4) and sample_grads.shape == (3, 4, cohort.layout.size)


def test_every_slot_trains_its_own_head():
    cohort = build("bert")
    head = cohort.layout.columns([n for n in cohort.layout.names if ".classifier." in n])
    assert len(head) == 3 * 24 + 3
    data = batches(cohort.task, [3])[0]
    mine = states(cohort, 1).repeat(3, 1)
    mine[1, head] *= 2
    losses, grads = cohort.gradients(mine, CohortBatch.of([data] * 3))
    assert losses[2].item() == pytest.approx(losses[0].item(), rel=1e-12) != losses[1].item()
    assert apart(grads[2], grads[0]) <= 1e-12 < apart(grads[1], grads[0])
    assert grads[:, head].abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "vera", "randlora"])
def test_the_unstacked_model_has_the_cohorts_logits_and_goes_back(family, adapter):
    cohort = build(family, adapter)
    mine, data = states(cohort, 2), batches(cohort.task, [3, 3])
    batch = CohortBatch.of(data)
    with torch.no_grad():
        logits = cohort.logits(cohort.layout.views(mine), batch)
        for slot in range(2):
            plain = cohort.unstacked(mine[slot])
            alone = plain(input_ids=batch.input_ids[slot], attention_mask=batch.attention_mask[slot]).logits
            names = {n for n, p in plain.named_parameters() if p.requires_grad}
            cohort.restack()
            torch.testing.assert_close(logits[slot], alone, rtol=1e-10, atol=1e-12)
            assert names == set(cohort.layout.names)
        again = cohort.logits(cohort.layout.views(mine), batch)
    assert torch.equal(again, logits)


def test_the_unstacked_model_holds_no_dropout_and_no_prefix_of_an_earlier_pass():
    cohort = build("bert", LoRA(rank=3, dropout=0.3), dropout=0.2)
    state, data = states(cohort, 1), batches(cohort.task, [3])
    calm = CohortBatch.of(data)
    with torch.no_grad():
        expected = cohort.logits(cohort.layout.views(state), calm)[0]
        cohort.losses(state, CohortBatch.of(data, [(1, 0, 1, 0)]))
        plain = cohort.unstacked(state[0])
        found = plain(input_ids=calm.input_ids[0], attention_mask=calm.attention_mask[0]).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_initial_state_is_what_peft_began_with():
    base, targets = tiny("bert")
    plain = ADAPTERS["lora"].attach(base, targets, seed=1)
    begun = {n: p.detach().clone() for n, p in plain.named_parameters() if p.requires_grad}
    cohort = Cohort(plain, base.task)
    assert torch.equal(cohort.initial, cohort.layout.flatten(begun))
    assert cohort.initial.dtype == torch.float32


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_a_bfloat16_base_gives_float32_gradients_within_its_precision(family, adapter):
    single, half = build(family, adapter, torch.float32), build(family, adapter, torch.bfloat16)
    assert half.layout == single.layout
    mine, batch = states(single, 3).float(), CohortBatch.of(batches(single.task, [4, 1, 3]))
    losses, grads = single.gradients(mine, batch)
    half_losses, half_grads = half.gradients(mine, batch)
    assert half_grads.dtype == torch.float32
    torch.testing.assert_close(half_losses, losses, rtol=3e-3, atol=3e-3)
    # RandLoRA multiplies matrices of the base's precision several times over.
    assert apart(half_grads, grads) <= (0.1 if adapter == "randlora" else 0.03)
    with torch.no_grad():
        assert half.logits(half.layout.views(mine), batch).dtype == torch.float32


def test_adalora_has_the_same_layout_in_either_precision():
    """PEFT lets its number of ranks train under bfloat16 and never saves it."""
    adapter = OPTIONS["ADALORA"]
    layouts = [build("bert", adapter, dtype).layout for dtype in (torch.float32, torch.bfloat16)]
    assert layouts[0] == layouts[1]
    assert not any("ranknum" in name for name in layouts[0].names)


def decoder_classifier(pad_id: int) -> Base:
    """GPT-2 with a classification head, which reads a sample's last token that is not ``pad_id``."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=32, num_labels=3, pad_token_id=pad_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=pad_id, eos_token_id=pad_id,
    )  # fmt: skip
    with seeded_globals(7, "decoder"):
        module = GPT2ForSequenceClassification(config).double().eval().requires_grad_(False)
    return Base(module, None, "classification", "score", "tiny", "tiny")


def test_padding_is_the_models_own_token_so_that_a_decoder_finds_the_last_one():
    pad_id = VOCABULARY - 1
    base = decoder_classifier(pad_id)
    cohort = Cohort(LoRA(rank=3).attach(base, ["c_attn"], seed=1).double(), base.task)
    data = batches("classification", [4, 1, 3])
    for batch in data:
        batch.input_ids[batch.attention_mask == 0] = pad_id
    assert len({b.input_ids.shape[1] for b in data}) > 1  # so that some slot is padded further
    mine = states(cohort, 3)
    losses, grads = cohort.gradients(mine, CohortBatch.of(data, pad_id=pad_id))
    for slot, batch in enumerate(data):
        loss, gradient = expect(cohort, mine[slot], batch)
        assert losses[slot].item() == pytest.approx(loss, rel=1e-9)
        assert apart(grads[slot], gradient) <= 1e-9


def test_a_causal_samples_loss_is_the_mean_over_its_own_targets():
    logits = torch.randn(1, 2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[[1, 2, 3, 4, 5], [-100, -100, 6, -100, -100]]])
    nll = -logits.log_softmax(-1)
    first = torch.stack([nll[0, 0, t, labels[0, 0, t + 1]] for t in range(4)]).mean()
    assert causal_loss(logits, labels)[0].tolist() == pytest.approx([first.item(), nll[0, 1, 1, 6].item()], rel=1e-12)


def test_a_causal_sample_without_targets_has_loss_zero():
    logits, labels = torch.zeros(1, 1, 3, 7), torch.full((1, 1, 3), -100)
    assert causal_loss(logits, labels).item() == 0


def test_a_batch_is_padded_to_the_longest_sample_and_the_largest_batch():
    data = batches("causal_lm", [4, 1, 3])
    batch = CohortBatch.of(data, pad_id=9)
    assert batch.input_ids.shape == (3, 4, max(b.input_ids.shape[1] for b in data))
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=1e-15, atol=0)
    assert batch.weights[1].tolist() == [1, 0, 0, 0] and batch.counts == [4, 1, 3]
    assert (batch.input_ids[1, 1:] == 9).all() and (batch.labels[1, 1:] == -100).all()
    assert batch.attention_mask[1, 1:].sum(-1).tolist() == [1, 1, 1]  # no softmax over nothing


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_split_keeps_every_sample_once_with_its_place_and_weight(parts):
    whole = CohortBatch.of(batches("classification", [4, 1, 3]))
    whole.offsets = [0, 5, 2]
    pieces = whole.split(parts)
    assert len(pieces) == parts
    assert torch.equal(torch.cat([p.input_ids for p in pieces], 1), whole.input_ids)
    assert torch.equal(torch.cat([p.weights for p in pieces], 1), whole.weights)
    for slot, count in enumerate(whole.counts):
        places = [p.offsets[slot] + j for p in pieces for j in range(p.counts[slot])]
        assert places == [whole.offsets[slot] + j for j in range(count)]


def test_a_model_without_trainable_tensors_is_refused():
    with pytest.raises(ConfigError, match="at least one trainable tensor"):
        Cohort(tiny("bert")[0].module, "classification")


def test_trainable_tensors_outside_peft_layers_are_refused_by_name():
    base, targets = tiny("bert")
    model = LoRA(rank=3).attach(base, targets, seed=1)
    model.get_submodule("base_model.model.bert.embeddings.LayerNorm").weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"embeddings\.LayerNorm\.weight.*inside PEFT layers or the head"):
        Cohort(model, base.task)


def test_the_slow_twin_is_blind_to_padding():
    cohort = build("llama")
    state, batch = states(cohort, 1)[0], batches("causal_lm", [2])[0]
    wider = Batch(*(torch.nn.functional.pad(t, (0, 3)) for t in (batch.input_ids, batch.attention_mask, batch.labels)))
    mine, theirs = expect(cohort, state, batch), expect(cohort, state, wider)
    assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])
