"""The adapter folder is what a user gets: plain PEFT loads it, and it is what the run's numbers are about."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from clients.adapters.base_change import Piece
from clients.adapters.space import Space
from clients.cohort import CohortBatch
from clients.data.batch import Batch
from clients.models import load_for_adapter
from clients.models.saved import load_merged
from fl import checkpoint, metrics
from fl.compose import compose
from fl.errors import ConfigError, ShoalError
from fl.experiment import BASE_SEED, Experiment, Settings
from fl.keys import generator
from fl.records import read_run
from fl.run import resume
from fl.saving import PROBE, Saved, export, model_card
from fl.state import ServerState
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
    saved = Saved({"loss": 1.0, "perplexity": 2.71828, "examples": 7})
    assert "| loss 1.0000, perplexity 2.7183 (7 examples, float32) |" in model_card({**texts, **counts}, saved)


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


# What is saved of a state that PEFT can't reload as it is: a core between the factors, or a changed base.

SMALL_GPT2 = "model.config={n_embd: 24, n_layer: 2, n_head: 2, n_positions: 64, vocab_size: 300}"
MODELS = {
    "encoder": (*ENCODER, "model.head_std=0.3"),
    "decoder": DECODER,
    "gpt2": ("model=shape", "model.architecture=gpt2", SMALL_GPT2, *DECODER[1:]),
}
CARD = {
    **dict.fromkeys(["name", "adapter", "data", "partition", "privacy"], "x"),
    **dict.fromkeys(["trainable", "clients", "rounds", "seed"], 1),
}
STATES = ["core", "factors", "matrix", "core and both"]


def a_state(space: Space, kind: str) -> ServerState:
    """A random state, with a random change of the base that may be factors, matrices, or either."""
    draw = generator("saving", kind)
    base = {}
    for i, module in enumerate(space.modules):
        d, k = space.sizes(module)
        if kind == "matrix" or (kind == "core and both" and i % 3 == 0):
            base[module.name] = Piece(0.2 * draw.normal(size=(d, k)).astype(np.float32), None)
        elif kind == "factors" or (kind == "core and both" and i % 3 == 1):
            left, right = draw.normal(size=(d, 40)), draw.normal(size=(40, k))  # more columns than the ranks there are
            base[module.name] = Piece((0.05 * left).astype(np.float32), right.astype(np.float32))
    vector = (0.2 * draw.normal(size=space.layout.size)).astype(np.float32)
    return ServerState(vector, space, base=base)


def save(folder: Path, words: tuple[str, ...], kind: str) -> tuple[Saved, torch.Tensor, Experiment, ServerState]:
    """Save a random state of the experiment ``words``; also the logits of the server's own model for the probe."""
    adapter = "adapter=lora_xs" if "core" in kind else "adapter=lora"
    resolved, _ = compose([*words, adapter])
    experiment = Experiment(Settings.of(resolved), SHARED)
    cohort = experiment.cohort(torch.float32, "sdpa", "cpu")
    server = a_state(cohort.space, kind)
    saved = export(experiment, server, folder / "adapter", {**CARD, "model_settings": resolved["model"]})
    probe = load_file(folder / "adapter" / PROBE)
    cohort.load_base(server.base)
    ids, mask = probe["input_ids"], probe["attention_mask"]
    labels = ids if experiment.num_labels is None else torch.zeros(len(ids), dtype=torch.long)
    with torch.no_grad():
        batch = CohortBatch.of([Batch(ids, mask, labels)])
        own = cohort.logits(cohort.layout.views(torch.from_numpy(server.vector)[None]), batch)[0]
    return saved, own, experiment, server


def as_the_card_says(folder: Path) -> torch.nn.Module:
    """The model that the lines of the card load."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "adapter" / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(folder / "adapter")), names)
    return names["model"].eval()


def dense_change(server: ServerState) -> list[np.ndarray]:
    found = []
    for change in server.space.delta(server.vector):
        found.append(change.left @ change.right)
        if change.name in server.base:
            found[-1] = found[-1] + server.base[change.name].matrix()
    return found


@pytest.mark.parametrize(
    ("kind", "form"), [*((k, "adapter") for k in STATES), ("core and both", "merged")], ids=lambda v: v
)
@pytest.mark.parametrize("name", MODELS)
def test_the_total_change_reloads_to_the_server_s_logits(tmp_path, name, kind, form):
    words = (*MODELS[name], f"saving.form={form}")
    saved, own, experiment, server = save(tmp_path, words, kind)
    model, probe = as_the_card_says(tmp_path), load_file(tmp_path / "adapter" / PROBE)
    with torch.no_grad():
        again = model(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    torch.testing.assert_close(again, own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, probe["logits"], atol=1e-6, rtol=1e-6)
    assert hasattr(model, "peft_config") is (form == "adapter")
    # Alone, neither the adapter nor the base's change would do.
    scores = experiment.central(experiment.trainer, server.vector, server.base)
    assert saved.scores["loss"] == pytest.approx(scores["loss"], rel=1e-5)
    if server.base:
        alone = experiment.central(experiment.trainer, server.vector, {})
        assert abs(alone["loss"] - scores["loss"]) > 1e-4
    assert saved.total
    assert saved.server is None
    assert saved.relative_error < 1e-7
    exact = max(np.linalg.matrix_rank(d, tol=1e-6 * np.linalg.norm(d)) for d in dense_change(server))
    assert saved.rank == (exact if form == "adapter" else None)
    # The base that other runs of the process share is as it was.
    spec, labels = experiment.settings.model, experiment.num_labels
    shared = experiment.shared.base(spec, labels, torch.float32, "sdpa", "cpu").module.state_dict()
    bare = spec.load(labels, BASE_SEED).module.state_dict()
    assert all(torch.equal(tensor, shared[key]) for key, tensor in bare.items())


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("kind", ["core and both", "plain"])
def test_a_cut_change_is_saved_with_its_own_scores_and_the_error_that_it_makes(tmp_path, kind, form):
    words = (*MODELS["encoder"], f"saving.form={form}", "saving.rank=3")
    saved, own, experiment, server = save(tmp_path, words, kind)
    spectra = [np.linalg.svd(d, compute_uv=False) for d in dense_change(server)]
    lost, size = (sum((s[low:] ** 2).sum() for s in spectra) for low in (3, 0))
    assert saved.rank == 3
    assert saved.relative_error == pytest.approx(np.sqrt(lost / size), rel=1e-6)
    assert saved.relative_error > 0.1
    # The probe and the scores are those of what was saved, and the server's stand beside them.
    model, probe = as_the_card_says(tmp_path), load_file(tmp_path / "adapter" / PROBE)
    with torch.no_grad():
        again = model(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    torch.testing.assert_close(again, probe["logits"], atol=1e-6, rtol=1e-6)
    assert (own - again).abs().max() > 1e-2
    data = experiment.data.test
    out = logits(model, data.batch(np.arange(len(data)))).double()
    loss = torch.nn.functional.cross_entropy(out, torch.from_numpy(np.array(data.labels))).item()
    assert saved.scores["loss"] == pytest.approx(loss, rel=1e-5)
    whole = experiment.central(experiment.trainer, server.vector, server.base)
    assert saved.server["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert saved.server["loss"] != pytest.approx(loss, rel=1e-4)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"cut to rank 3 (of {saved.needed}), which leaves out {saved.relative_error:.2e} of it" in card
    assert f"| Untruncated | loss {whole['loss']:.4f}," in card
    assert f"| Test set | loss {loss:.4f}," in card
    assert "that the saved model gave" in card
    assert saved.record() == {
        "form": form, "total": True, "rank": 3, "relative_error": saved.relative_error, "server": saved.server,
    }  # fmt: skip


def test_a_total_of_several_ranks_says_the_largest_and_keeps_each(tmp_path):
    server = save(tmp_path, MODELS["encoder"], "core and both")[3]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = [t.shape[0] for n, t in tensors.items() if "lora_A" in n]
    exact = [np.linalg.matrix_rank(d, tol=1e-6 * np.linalg.norm(d)) for d in dense_change(server)]
    assert sorted(ranks) == sorted(exact)
    assert len(set(ranks)) > 1
    assert (
        f"the total weight change as one plain LoRA adapter of rank {max(ranks)} |"
        in (tmp_path / "adapter" / "README.md").read_text()
    )


def test_a_rank_that_cuts_nothing_leaves_the_adapter_as_it_was_trained(tmp_path):
    saved = save(tmp_path, (*ENCODER, "saving.rank=8"), "plain")[0]
    assert saved.record() == {"form": "adapter", "total": False, "rank": 8, "relative_error": 0.0}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| Saved |" not in card
    assert "that the server's model gave" in card


def test_an_exact_total_within_the_rank_is_not_called_cut(tmp_path):
    saved = save(tmp_path, (*ENCODER, "model.head_std=0.3", "saving.rank=400"), "factors")[0]
    assert saved.server is None
    assert "cut to" not in (tmp_path / "adapter" / "README.md").read_text()


MERGED = {
    "encoder lora": (ENCODER, []),
    "decoder lora": (DECODER, []),
    "encoder dora": (ENCODER, ["adapter.dora=true"]),
    "decoder ia3": (DECODER, [PEFT, "adapter.method=IA3"]),
    "encoder vera": (ENCODER, [PEFT, "adapter.method=VERA", "adapter.rank=4"]),
    # Its weight is that of the output layer too, which keeps its own.
    "decoder embedding": (DECODER, ["adapter.target_modules=[embed_tokens,q_proj]"]),
    "decoder embedding, cut": (DECODER, ["adapter.target_modules=[embed_tokens,q_proj]", "saving.rank=2"]),
}


@pytest.mark.parametrize("case", MERGED)
def test_a_run_leaves_a_whole_model_where_that_is_asked_for(tmp_path, case):
    base, more = MERGED[case]
    folder = tmp_path / "run"
    go(folder, *more, "local.lr=0.05", "saving.form=merged", base=base)
    names = {p.name for p in (folder / "adapter").iterdir()}
    assert names >= {"config.json", "model.safetensors", "README.md", "shoal.json", "tokenizer.json", PROBE}
    assert "adapter_config.json" not in names
    model, probe = as_the_card_says(folder), load_file(folder / "adapter" / PROBE)
    again = model(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    torch.testing.assert_close(again, probe["logits"], atol=1e-6, rtol=1e-6)
    # It is the model that the run trained (the cut one: that the run scored).
    data = Experiment(Settings.of(compose([*base, *more])[0]), SHARED).data.test
    batch = data.batch(np.arange(len(data)))
    out = logits(model, batch).double()
    pair = (out[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()) if base is DECODER else (out, batch.labels)
    loss = torch.nn.functional.cross_entropy(*pair).item()
    assert final(folder)["loss"] == pytest.approx(loss, rel=1e-5)
    whole = pytest.approx(evaluations(folder)[-1]["loss"], rel=1e-5)
    assert (loss == whole) is ("saving.rank=2" not in more)
    assert read_run(folder)["saved"]["form"] == "merged"
    assert model.config.use_cache is True or not hasattr(model.config, "use_cache")
    card = (folder / "adapter" / "README.md").read_text()
    assert "library_name: transformers\n" in card
    assert "# run: a model trained federatedly with Shoal" in card
    assert ", merged into the base's weights" in card


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_a_classifier_of_the_hub_s_kind_reloads_merged(tmp_path, pooling):
    from clients.models import TinyEncoder

    spec = TinyEncoder()
    spec.load(3, 0).module.backbone.save_pretrained(tmp_path / "bert")
    spec.tokenizer().save_pretrained(tmp_path / "bert")
    words = ("model=hf", f"model.name={tmp_path / 'bert'}", f"model.pooling={pooling}", *ENCODER[1:])
    go(tmp_path / "run", "adapter.target_modules=[query]", "saving.form=merged", "local.lr=0.05", base=words)
    model, probe = as_the_card_says(tmp_path / "run"), load_file(tmp_path / "run" / "adapter" / PROBE)
    again = model(input_ids=probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    torch.testing.assert_close(again, probe["logits"], atol=1e-6, rtol=1e-6)
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert ("AutoModelForSequenceClassification" in text) is (pooling == "native")


def test_run_json_says_what_was_saved_and_its_final_numbers_are_of_that(tmp_path):
    outcome = go(tmp_path / "run", "saving.rank=1", "local.lr=0.05", "local.steps=6")
    saved = outcome.run["saved"]
    assert saved["server"]["loss"] == pytest.approx(evaluations(tmp_path / "run")[-1]["loss"], rel=1e-5)
    assert 0 < saved["relative_error"] < 1
    assert saved["rank"] == 1
    assert final(tmp_path / "run")["loss"] != pytest.approx(saved["server"]["loss"], rel=1e-5)
    out = load(tmp_path / "run")
    data = Experiment(Settings.of(compose(ENCODER)[0]), SHARED).data.test
    loss = torch.nn.functional.cross_entropy(
        logits(out, data.batch(np.arange(len(data)))).double(), torch.from_numpy(np.array(data.labels))
    )
    assert final(tmp_path / "run")["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("how", ["refused", "wrong"])
def test_a_merge_that_peft_refuses_or_gets_wrong_stops_with_the_way_out(tmp_path, monkeypatch, how):
    from peft.tuners.tuners_utils import BaseTuner

    real = BaseTuner.merge_and_unload

    def broken(self, *args, **kwargs):
        if how == "refused":
            raise NotImplementedError("not for this one")
        return self.unload()

    with monkeypatch.context() as patch:
        patch.setattr(BaseTuner, "merge_and_unload", broken)
        with pytest.raises(ShoalError, match=r"PEFT can't merge this adapter .*saving\.form.*--resume"):
            go(tmp_path / "run", "saving.form=merged", "local.lr=0.05")
    assert BaseTuner.merge_and_unload is real
    assert not (tmp_path / "run" / "adapter").exists()
    if how == "wrong":
        return
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("form: merged", "form: adapter"))
    resumed = resume(tmp_path / "run", shared=SHARED, quiet=True)
    assert resumed.run["saved"]["form"] == "adapter"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ([PEFT, "saving.rank=2"], "saving.rank"),
        (["adapter.dora=true", "saving.rank=2"], "saving.rank"),
        ([PEFT, "adapter.method=lily", "saving.form=merged"], "saving.form"),
        (["saving.form=pickle"], "saving.form"),
        (["saving.rank=0"], "saving.rank"),
    ],
)
def test_what_can_t_be_saved_so_is_refused_at_once(words, key):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}="):
        Settings.of(compose([*ENCODER, *words])[0])


def test_the_two_kinds_of_folder_are_not_mistaken_for_each_other(tmp_path):
    save(tmp_path / "whole", (*ENCODER, "model.head_std=0.3", "saving.form=merged"), "plain")
    save(tmp_path / "part", ENCODER, "plain")
    with pytest.raises(ShoalError, match="holds a whole model; load it with .*load_merged"):
        load_for_adapter(tmp_path / "whole" / "adapter")
    with pytest.raises(ShoalError, match="holds an adapter; load it with .*load_for_adapter"):
        load_merged(tmp_path / "part" / "adapter")
    head = tmp_path / "whole" / "adapter" / "head.safetensors"
    head.write_bytes(b"no tensors")
    with pytest.raises(ShoalError, match=r"head\.safetensors can't be read"):
        load_merged(tmp_path / "whole" / "adapter")
