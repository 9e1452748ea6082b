import pytest
import torch

from clients.models import TinyEncoder
from fl.compose import compose
from fl.errors import ConfigError
from fl.experiment import Experiment, Settings, Shared
from tests.helpers import DECODER, ENCODER, SHARED, go, vector, weights


def settings(*more: str, base=ENCODER) -> Settings:
    return Settings.of(compose([*base, *more])[0])


def experiment(*more: str, base=ENCODER, shared=SHARED) -> Experiment:
    return Experiment(settings(*more, base=base), shared)


# Settings


def test_every_group_is_an_object_with_checked_settings():
    found = settings("partition=dirichlet", "partition.alpha=2", "server_optimizer=fedadam")
    assert (type(found.partition).__name__, found.partition.alpha) == ("Dirichlet", 2.0)
    assert type(found.server_optimizer).__name__ == "FedAdam"
    assert found.engine.cohort_size == 4


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "a\\b"])
def test_a_name_has_to_be_a_folder_s(name):
    with pytest.raises(ConfigError, match=r"^name="):
        settings(f"name='{name}'")


def test_all_clients_are_asked_unless_told():
    assert experiment().per_round == 4
    assert experiment("clients.per_round=3").per_round == 3
    assert experiment("partition=natural", "clients.number=null").per_round == 6


def test_the_number_of_labels_is_the_data_s():
    assert experiment().num_labels == 3
    assert experiment(base=DECODER).num_labels is None


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["clients.number=null"], "clients.number"),
        (["partition=natural", "clients.number=null", "clients.per_round=7"], "clients.per_round"),
        (["attack=faulty", "attack.clients=[0,9]"], "attack.clients"),
        (["adapter=peft", "adapter.method=NOPE"], "adapter.method"),
    ],
)
def test_what_only_the_data_show_is_refused_by_name(words, key):
    with pytest.raises(ConfigError) as raised:
        _ = experiment(*words).data
    assert raised.value.key == key


def test_a_device_that_is_not_there_is_refused_before_the_data_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Shared, "data", None)
    with pytest.raises(ConfigError, match=r"engine\.device='cuda'"):
        _ = experiment("engine.device=cuda").data


# What runs of one process share


def test_a_base_is_loaded_once_and_its_copies_share_the_weights(loads):
    shared = Shared()
    spec = TinyEncoder()
    first, second = (shared.base(spec, 3, torch.float32, "sdpa", "cpu") for _ in range(2))
    assert len(loads) == 1
    assert first.module is not second.module
    pointers = [{n: p.data_ptr() for n, p in base.module.named_parameters()} for base in (first, second)]
    assert pointers[0] == pointers[1]
    shared.base(spec, 4, torch.float32, "sdpa", "cpu")
    shared.base(spec, 3, torch.float32, "eager", "cpu")
    assert len(loads) == 3
    assert (shared.base(spec, 3, torch.float32, "eager", "cpu")).module.config._attn_implementation == "eager"


def test_adapting_a_copy_leaves_the_shared_base_alone(loads):
    shared = Shared()
    spec = TinyEncoder()
    before = {n: p.clone() for n, p in shared.base(spec, 3, torch.float32, "sdpa", "cpu").module.named_parameters()}
    for words in (
        [],
        ["adapter=peft"],
        ["adapter=peft", "adapter.method=OFT", "adapter.options={r: 0, oft_block_size: 8}"],
    ):
        cohort = experiment(*words, shared=shared).cohort(torch.float32, "sdpa", "cpu")
        cohort.unstacked(torch.randn(cohort.layout.size, generator=torch.Generator().manual_seed(0)))
    after = dict(shared.base(spec, 3, torch.float32, "sdpa", "cpu").module.named_parameters())
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(p.requires_grad for p in after.values())
    assert len(loads) == 1


def test_only_a_few_bases_are_kept(loads):
    shared = Shared()
    for labels in range(2, 9):
        shared.base(TinyEncoder(), labels, torch.float32, "sdpa", "cpu")
    assert len(shared.bases) == 4
    assert len(loads) == 7


def test_the_run_s_seed_moves_the_adapter_but_not_the_base(loads):
    cohorts = [experiment(f"seed={seed}", shared=SHARED).cohort(torch.float32, "sdpa", "cpu") for seed in (0, 0, 1)]
    assert torch.equal(cohorts[0].initial, cohorts[1].initial)
    assert not torch.equal(cohorts[0].initial, cohorts[2].initial)
    frozen = [dict(c.model.named_parameters()) for c in cohorts]
    assert all(torch.equal(frozen[0][n], frozen[2][n]) for n in frozen[0])


def test_tokens_are_read_once():
    shared = Shared()
    first, second = experiment("seed=1", shared=shared).data, experiment("seed=2", shared=shared).data
    assert first.train is second.train
    assert first.parts[0].tolist() != second.parts[0].tolist()
    other = experiment("data.max_length=8", shared=shared).data
    assert other.train is not first.train


# The frozen prefix

TOP = ["adapter.layers=[1]"]


def test_the_prefix_changes_nothing_but_rounding(tmp_path):
    for choice in ("always", "auto", "never"):
        go(tmp_path / choice, *TOP, f"model.prefix_cache={choice}")
    assert weights(tmp_path / "always") == weights(tmp_path / "auto")
    a, b = vector(tmp_path / "always"), vector(tmp_path / "never")
    assert abs(a - b).max() < 1e-5
    assert abs(b).max() > 0.01


def test_auto_computes_a_prefix_where_it_can():
    for words, expected in (
        (TOP, True),
        ([], False),
        ([*TOP, "model.dropout=0.1"], False),
        ([*TOP, "model.prefix_cache=never"], False),
    ):
        made = experiment(*words)
        try:
            assert (made.trainer.worker.prefix is not None) == expected
        finally:
            made.close()


@pytest.mark.parametrize(
    ("words", "reason"),
    [([], "no layer lies below the first adapter"), ([*TOP, "model.dropout=0.1"], "dropout is on")],
)
def test_a_prefix_that_is_not_possible_is_refused(words, reason):
    with pytest.raises(ConfigError, match=reason):
        _ = experiment(*words, "model.prefix_cache=always").trainer


def test_closing_ends_the_workers_and_may_be_done_twice():
    made = experiment("engine.workers=2")
    children = list(made.trainer.pool.children)
    assert all(child.is_alive() for child in children)
    made.close()
    made.close()
    assert not any(child.is_alive() for child in children)
    Experiment(settings()).close()
