"""The adapter folder is what a user gets: plain PEFT loads it, and it is what the run's numbers are about."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clients.data.batch import Batch
from clients.models import load_for_adapter
from fl import checkpoint, metrics
from fl.compose import compose
from fl.experiment import Experiment, Settings
from fl.saving import PROBE, model_card
from tests.helpers import DECODER, ENCODER, SHARED, evaluations, final, go

PEFT = "adapter=peft"
CASES = {
    "encoder lora": (ENCODER, []),
    "encoder rslora": (ENCODER, ["adapter.rslora=true", "adapter.rank=3"]),
    "encoder dora": (ENCODER, ["adapter.dora=true"]),
    "encoder one layer": (ENCODER, ["adapter.layers=[1]", "model.prefix_cache=always"]),
    "decoder lora": (DECODER, []),
    "decoder dora": (DECODER, ["adapter.dora=true"]),
    "encoder vera": (ENCODER, [PEFT, "adapter.method=VERA", "adapter.rank=4"]),
    "encoder ia3": (ENCODER, [PEFT, "adapter.method=IA3"]),
    "encoder lokr": (ENCODER, [PEFT, "adapter.method=LOKR", "adapter.rank=4"]),
    "encoder miss": (ENCODER, [PEFT, "adapter.method=MISS", "adapter.rank=4"]),
    "encoder oft": (ENCODER, [PEFT, "adapter.method=OFT", "adapter.options={r: 0, oft_block_size: 8}"]),
    "decoder vera": (DECODER, [PEFT, "adapter.method=VERA"]),
    "decoder ia3": (DECODER, [PEFT, "adapter.method=IA3"]),
    "decoder lokr": (DECODER, [PEFT, "adapter.method=LOKR", "adapter.rank=4"]),
    "decoder miss": (DECODER, [PEFT, "adapter.method=MISS", "adapter.rank=4"]),
    "decoder oft": (DECODER, [PEFT, "adapter.method=OFT", "adapter.options={r: 0, oft_block_size: 4}"]),
}


def load(folder: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_for_adapter(folder / "adapter"), folder / "adapter").eval()


def logits(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_loads_it_and_gives_the_same_logits(tmp_path, case):
    base, more = CASES[case]
    folder = tmp_path / "run"
    go(folder, *more, "local.lr=0.05", base=base)
    model, probe = load(folder), load_file(folder / "adapter" / PROBE)
    again = model(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    torch.testing.assert_close(again, probe["logits"], atol=1e-5, rtol=1e-5)
    # The base by itself gives others: the adapter (not only a head) is in it.
    bare = load_for_adapter(folder / "adapter").eval()
    if hasattr(bare, "classifier"):
        bare.classifier.load_state_dict(
            {
                k: v.detach()
                for k, v in model.base_model.model.classifier.modules_to_save["default"].state_dict().items()
            }
        )
    without = bare(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    assert (without - probe["logits"]).abs().max() > 1e-4
    # And run.json's final numbers are its numbers.
    data = Experiment(Settings.of(compose([*base, *more])[0]), SHARED).data.test
    batch = data.batch(np.arange(len(data)))
    out, found = logits(model, batch).double(), final(folder)
    if base is ENCODER:
        labels = torch.from_numpy(np.array(data.labels))
        assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(out, labels).item(), rel=1e-5)
        predicted = out.argmax(-1).numpy()
        assert found["accuracy"] == metrics.accuracy(predicted, np.array(data.labels))
        assert found["macro_f1"] == metrics.macro_f1(predicted, np.array(data.labels))
    else:
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).item()
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    # Which are those of the last evaluation too, as training was in float32.
    assert found["loss"] == pytest.approx(evaluations(folder)[-1]["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    go(folder, "name=mine", "seed=3", "schedule.rounds=3", "clients.per_round=2")
    return folder


def test_the_folder_holds_what_peft_and_a_reader_need_and_nothing_pickled(run):
    names = {p.name for p in (run / "adapter").rglob("*") if p.is_file()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "shoal.json", PROBE}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    for path in run.rglob("*"):
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".npy", ".ckpt")
        assert not path.is_file() or path.read_bytes()[:2] not in (b"\x80\x04", b"PK")


def test_it_holds_the_server_s_vector(run):
    arrays, meta = checkpoint.load(run / "checkpoint")
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    vector, start = arrays["server/vector"], 0
    for name, shape in zip(meta["server"]["names"], meta["server"]["shapes"], strict=True):
        size = int(np.prod(shape))
        found = saved[name.replace(".default", "").replace("modules_to_save.", "")]
        np.testing.assert_array_equal(found.numpy().ravel(), vector[start : start + size])
        start += size
    assert start == sum(t.numel() for t in saved.values())


def test_the_tokenizer_comes_with_it(run):
    from transformers import AutoTokenizer

    from clients.models import TinyEncoder

    text = "the soup was good"
    assert (
        AutoTokenizer.from_pretrained(run / "adapter")(text)["input_ids"]
        == TinyEncoder().tokenizer()(text)["input_ids"]
    )


def test_the_adapter_names_its_base(run):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "shoal/tiny-encoder"
    assert config["r"] == 8
    assert config["modules_to_save"] == ["classifier"]
    spec = json.loads((run / "adapter" / "shoal.json").read_text())
    assert spec["num_labels"] == 3
    assert spec["model"]["_target_"] == "clients.models.TinyEncoder"


def test_the_card_says_what_it_is_how_it_was_made_and_what_it_promises(run):
    card = (run / "adapter" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert "base_model: shoal/tiny-encoder\n" in head
    assert "library_name: peft" in head
    found = final(run)
    for part in (
        "# mine:", "| `shoal/tiny-encoder` |", "LoRA, 3,427 trainable parameters", "4 clients (Iid)",
        "3 rounds, seed 3", f"loss {found['loss']:.4f}", f"accuracy {found['accuracy']:.4f}", "(48 examples, float32)",
        "**Privacy.** No privacy guarantee", "**Licence.**",
    ):  # fmt: skip
        assert part in body
    assert "None" not in card


def test_the_card_s_example_loads_the_adapter(run, monkeypatch):
    card = (run / "adapter" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(run / "adapter")), names)
    probe = load_file(run / "adapter" / PROBE)
    model = names["model"].eval()
    torch.testing.assert_close(
        model(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits, probe["logits"],
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_the_probe_is_nobody_s_data_and_pads(run):
    probe = load_file(run / "adapter" / PROBE)
    assert probe["input_ids"].shape == (4, 12)
    assert 0 < probe["attention_mask"].sum() < 48
    assert probe["logits"].shape == (4, 3)


def test_a_card_of_a_causal_model_reports_perplexity():
    texts = dict.fromkeys(["base_model", "name", "adapter", "data", "partition", "privacy"], "x")
    counts = dict.fromkeys(["trainable", "clients", "rounds", "seed"], 1)
    values = {**texts, **counts, "scores": {"loss": 1.0, "perplexity": 2.71828, "examples": 7}}
    assert "| loss 1.0000, perplexity 2.7183 (7 examples, float32) |" in model_card(values)


def test_a_coarser_base_is_saved_and_scored_in_float32(tmp_path):
    """Trained over bfloat16, the final numbers are those of the float32 model that a user loads."""
    folder = tmp_path / "run"
    go(folder, "engine.dtype=bfloat16", "local.lr=0.02")
    probe = load_file(folder / "adapter" / PROBE)
    again = load(folder)(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    torch.testing.assert_close(again, probe["logits"], atol=1e-5, rtol=1e-5)
    data = Experiment(Settings.of(compose(ENCODER)[0]), SHARED).data.test
    out = logits(load(folder), data.batch(np.arange(len(data)))).double()
    labels = torch.from_numpy(np.array(data.labels))
    assert final(folder)["loss"] == pytest.approx(torch.nn.functional.cross_entropy(out, labels).item(), rel=1e-5)
    assert final(folder)["loss"] != pytest.approx(evaluations(folder)[-1]["loss"], rel=1e-6)
