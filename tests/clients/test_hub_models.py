"""Local folders as models: both tasks, both kinds of head, and what is refused. (A hub name takes the same path.)"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from clients.models import HubModel
from clients.models.tokenizers import byte_tokenizer, word_tokenizer
from fl.errors import ConfigError, ShoalError
from fl.keys import seeded_globals

SIZE = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
TEXT = ["the ferry was bright", "we found the map very plain today"]


def save(folder, config, auto_class, tokenizer, **options):
    with seeded_globals("saved"):
        model = auto_class.from_config(config)
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def bert(tmp_path):
    tokenizer = word_tokenizer("encoder")
    config = BertConfig(vocab_size=len(tokenizer), num_labels=3, **SIZE)
    return tmp_path, save(tmp_path, config, AutoModelForSequenceClassification, tokenizer)


@pytest.fixture
def llama(tmp_path):
    tokenizer = word_tokenizer("decoder")
    config = LlamaConfig(vocab_size=len(tokenizer), **SIZE)
    return tmp_path, save(tmp_path, config, AutoModelForCausalLM, tokenizer)


def logits(module, tokenizer):
    encoded = tokenizer(TEXT, padding=True, return_tensors="pt")
    with torch.no_grad():
        return module(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits


def test_a_saved_classifier_keeps_its_own_head(bert):
    folder, model = bert
    base = HubModel(name=str(folder)).load(3, 0)
    assert base.head == "classifier" and base.task == "classification" and base.name == str(folder)
    assert torch.equal(logits(base.module, base.tokenizer), logits(model, base.tokenizer))
    assert not base.module.training and not any(p.requires_grad for p in base.module.parameters())


def test_another_number_of_labels_is_a_new_head_from_the_seed(bert, capfd):
    folder, model = bert
    first, again, other = (HubModel(name=str(folder)).load(5, seed).module for seed in (0, 0, 1))
    assert first.classifier.weight.shape == (5, 24) and first.classifier.weight.std() > 0
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    query = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(first.get_submodule(query).weight, model.get_submodule(query).weight)
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_mean_pooling_starts_at_zero_on_the_saved_encoder(bert):
    folder, model = bert
    base = HubModel(name=str(folder), pooling="mean").load(4, 0)
    assert base.head == "classifier" and logits(base.module, base.tokenizer).abs().max() == 0
    assert torch.equal(
        base.module.backbone.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight
    )
    assert not [n for n, _ in base.module.named_parameters() if "pooler" in n]


def test_a_causal_model(llama):
    folder, model = llama
    spec = HubModel(name=str(folder), task="causal_lm")
    base = spec.load(None, 0)
    assert base.head is None and spec.target_modules == ["q_proj", "v_proj"]
    assert torch.equal(logits(base.module, base.tokenizer), logits(model, base.tokenizer))
    assert base.module.config.use_cache is False


def test_a_decoder_as_a_classifier_reads_its_last_real_token(llama):
    folder, _ = llama
    base = HubModel(name=str(folder)).load(2, 0)
    assert base.head == "score"
    both = logits(base.module, base.tokenizer)
    encoded = base.tokenizer(TEXT[:1], return_tensors="pt")
    with torch.no_grad():
        alone = base.module(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    torch.testing.assert_close(both[:1], alone)


@pytest.mark.parametrize(
    ("config", "head", "targets"),
    [
        (RobertaConfig(vocab_size=300, num_labels=2, pad_token_id=0, **SIZE), "classifier", ["query", "value"]),
        (GPT2Config(vocab_size=300, n_embd=24, n_head=2, n_layer=1, num_labels=2), "score", ["c_attn"]),
    ],
    ids=lambda c: getattr(c, "model_type", None),
)
def test_other_architectures_name_their_heads(tmp_path, config, head, targets):
    model = save(tmp_path, config, AutoModelForSequenceClassification, byte_tokenizer("encoder"))
    spec = HubModel(name=str(tmp_path))
    base = spec.load(2, 0)
    assert base.head == head and spec.target_modules == targets
    trained = dict(base.module.get_submodule(head).named_parameters())
    assert trained and all(torch.equal(p, model.get_submodule(head).get_parameter(n)) for n, p in trained.items())


def test_no_default_targets_is_a_clear_error(tmp_path):
    config = DistilBertConfig(vocab_size=300, dim=24, n_heads=2, n_layers=1, hidden_dim=40)
    save(tmp_path, config, AutoModelForSequenceClassification, byte_tokenizer("encoder"))
    with pytest.raises(ConfigError, match=r"adapter\.target_modules.*distilbert"):
        HubModel(name=str(tmp_path)).target_modules


def test_pickled_weights_are_never_read(bert):
    folder, model = bert
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ShoalError, match="safetensors only"):
        HubModel(name=str(folder)).load(3, 0)


def test_code_in_a_checkpoint_is_never_run(bert):
    folder, _ = bert
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    text = (folder / "config.json").read_text()
    changed = text.replace('"model_type": "bert"', '"model_type": "odd", "auto_map": {"AutoConfig": "evil.Config"}')
    assert changed != text
    (folder / "config.json").write_text(changed)
    with pytest.raises(ShoalError, match="never runs code"):
        HubModel(name=str(folder)).load(3, 0)


def test_a_checkpoint_that_lacks_layers_is_refused(bert):
    folder, _ = bert
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    with pytest.raises(ShoalError, match=r"lacks 16 weights.*layer\.1"):
        HubModel(name=str(folder)).load(3, 0)


def test_an_unknown_name_without_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (lambda m: m.load(2, 0), lambda m: m.tokenizer(), lambda m: m.target_modules):
        with pytest.raises(ShoalError, match="HF_HUB_OFFLINE") as failure:
            call(HubModel(name="nobody/nothing-of-the-kind"))
        text = str(failure.value)
        assert "'nobody/nothing-of-the-kind' can't be loaded" in text and "\n" not in text


def test_a_name_is_needed():
    with pytest.raises(ConfigError, match=r"model\.name=None"):
        HubModel()


def test_the_fingerprint_follows_the_content_not_the_folder(bert, tmp_path_factory):
    folder, model = bert
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    here, there = HubModel(name=str(folder)), HubModel(name=str(copy))
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() != HubModel(name=str(folder), pooling="mean").fingerprint()
    model.classifier.bias.data += 1
    model.save_pretrained(copy)
    assert here.fingerprint() != there.fingerprint()


def test_dropout_reaches_the_head_too(bert):
    module = HubModel(name=str(bert[0]), dropout=0.2).load(3, 0).module
    assert module.dropout.p == 0.2 and module.bert.encoder.layer[0].attention.self.dropout.p == 0.0
