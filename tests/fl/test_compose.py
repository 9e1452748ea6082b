"""What Hydra composes, and what becomes of its messages: they are made by Hydra itself here, not copied."""

import itertools
from pathlib import Path

import pytest

from fl.compose import RUN_DIR, SWEEP_DIR, compose, expand, flat
from fl.errors import ConfigError
from fl.experiment import Settings

TINY = ["model=tiny-encoder", "data=tiny"]


def error_of(*words: str) -> ConfigError:
    """What is said of the words, by the composition or by the settings' own checks: one line, with a way out."""
    with pytest.raises(ConfigError) as raised:
        Settings.of(compose(words)[0])
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 900
    assert "hydra.cc" not in text
    return raised.value


def test_the_defaults_are_the_quickstart():
    resolved, folders = compose([])
    settings = Settings.of(resolved)
    assert (settings.name, settings.seed, settings.clients.number) == ("run", 0, 10)
    assert "hydra" not in resolved
    assert "experiment" not in resolved
    assert folders[RUN_DIR].parts[:2] == ("outputs", "run")
    assert folders[SWEEP_DIR].parts[:2] == ("outputs", "run-sweep")


def test_the_run_folder_is_the_one_that_was_named():
    _, folders = compose(["hydra.run.dir=a/b c", "hydra.sweep.dir=/d"])
    assert (folders[RUN_DIR], folders[SWEEP_DIR]) == (Path("a/b c"), Path("/d"))
    assert compose(["hydra.run.dir='with=sign,and [more]'"])[1][RUN_DIR] == Path("with=sign,and [more]")
    assert compose(["experiment=quickstart"])[1][RUN_DIR].parts[:2] == ("outputs", "quickstart")
    assert compose(["name=mine"])[1][RUN_DIR].parts[1] == "mine"


def test_settings_come_last_whatever_their_order():
    for words in itertools.permutations(["experiment=quickstart", "schedule.rounds=3", "network=instant"]):
        settings = Settings.of(compose(words)[0])
        assert settings.schedule.rounds == 3
        assert type(settings.network).__name__ == "Instant"
        assert settings.local.steps == 6  # the preset's


def test_a_preset_may_be_chosen_twice_and_the_last_counts():
    assert compose(["seed=1", "seed=2"])[0]["seed"] == 2


def test_a_preset_s_settings_go_with_the_option_that_they_were_for():
    words = ["experiment=quickstart", "partition=iid"]  # the preset sets partition.alpha, which iid has not
    assert compose(words)[0]["partition"] == compose(["partition=iid"])[0]["partition"]
    assert compose(["experiment=quickstart", "partition=dirichlet"])[0]["partition"]["alpha"] == 1.0
    assert compose(["experiment=quickstart", "partition=quantity"])[0]["partition"]["alpha"] == 1.0
    assert compose(["experiment=quickstart", "local=sgd"])[0]["local"]["steps"] == 6
    assert error_of(*words, "partition.alpha=2").key == "partition.alpha"  # what was typed is not dropped
    assert error_of("partition=iid", "partition.alpha=2").key == "partition.alpha"


def test_values_are_those_of_yaml():
    words = ["local.lr=1e-3", "local.clip_norm=null", "report=false", "name='5'", "adapter.target_modules=[query,key]"]
    resolved, _ = compose([*TINY, *words])
    assert resolved["local"]["lr"] == 0.001
    assert resolved["local"]["clip_norm"] is None
    assert resolved["report"] is False
    assert resolved["name"] == "5"
    assert resolved["adapter"]["target_modules"] == ["query", "key"]


@pytest.mark.parametrize("word", ["adapter.options.r=4", "adapter.options={r:4}", "+adapter.options.r=4"])
def test_open_mappings_can_be_filled(word):
    assert Settings.of(compose(["adapter=peft", word])[0]).adapter.options == {"r": 4}


def test_nested_groups_are_chosen_with_a_slash():
    settings = Settings.of(compose(["local/optimizer=sgd", "local.optimizer.momentum=0.5"])[0])
    assert (type(settings.local.optimizer).__name__, settings.local.optimizer.momentum) == ("SGD", 0.5)


def test_a_setting_that_is_deleted_is_its_class_default():
    assert Settings.of(compose(["~local.batch_size", "~clients.number"])[0]).local.batch_size == 16


def test_composing_twice_gives_the_same():
    words = ["seed=3", "model=tiny-encoder", "partition.alpha=2"]
    assert compose(words)[0] == compose(words)[0]


# Errors: words -> key, value, part of what is allowed, part of the way out

MODELS = "hf, minilm, shape, smollm2, tiny-decoder, tiny-encoder"
WRONG = {
    "unknown key": (["foo=1"], "foo", 1, "no such setting; the experiment has", "shoal list"),
    "unknown key of a group": (["local.zzz=1"], "local.zzz", 1, "no such setting; local has", "shoal list local"),
    "misspelt key": (["local.lrr=1"], "local.lrr", 1, "no such setting", "Did you mean lr?"),
    "added key": (["+new.key=1"], "new.key", 1, "no such setting; the experiment has", ""),
    "key below a value": (["seed.x=1"], "seed", {"x": 1}, "a whole number", ""),
    "unknown option": (["model=nope"], "model", "nope", f"one of {MODELS}", "shoal list model"),
    "misspelt option": (["model=tiny_encoder"], "model", "tiny_encoder", MODELS, "Did you mean tiny-encoder?"),
    "unknown nested option": (["local/optimizer=x"], "local/optimizer", "x", "one of adamw, momentum", ""),
    "unknown experiment": (["experiment=x"], "experiment", "x", "quickstart", "shoal list experiment"),
    "unknown group": (["local/x=y"], "local/x", "y", "no such group", "shoal list"),
    "group in another place": (["local@x=sgd"], "local@x", "sgd", "no such group", "shoal list"),
    "no option": (["model=null"], "model", None, "the name of an option", "shoal list model"),
    "settings for an option": (["local={lr: 1}"], "local", {"lr": 1}, "the name of an option", "shoal list local"),
    "several options": (["model=[a,b]"], "model", ["a", "b"], "the name of an option", "shoal list model"),
    "group with a dot": (["local.optimizer=sdg"], "local/optimizer", "sdg", "one of adamw, momentum, sgd", "sgd?"),
    "value for a section": (["clients=3"], "clients", 3, "several settings: number, per_round", "clients.number=VALUE"),
    "list for a section": (["clients=[3]"], "clients", "[3]", "of another kind", ""),
    "list of values": (["seed=0,1"], "seed", "0,1", "one value for each setting", "shoal sweep"),
    "range": (["seed=range(0,3)"], "seed", "range(0,3)", "one value for each setting", "shoal sweep"),
    "no value": (["model"], "model", None, "written key=value", ""),
    "no key": (["=1"], "=1", "1", "written key=value", ""),
    "an option of the command": (["-x"], "-x", None, "written key=value", ""),
    "open bracket": (["local.lr=[1"], "local.lr", "[1", "can't be read", "Quote"),
    "two signs": (["seed==1"], "seed", "=1", "can't be read", "Quote"),
    "unquoted sign": (["hydra.run.dir=a=b"], "hydra.run.dir", "a=b", "can't be read", "Quote"),
    "empty value": (["local.lr="], "local.lr", "", "a number", ""),
    "add what is there": (["+seed=1"], "+seed", "1", "already", "Write seed=VALUE"),
    "add an option": (["+model=hf"], "+model", "hf", "already", "Write model=NAME"),
    "delete what is not there": (["~nope"], "~nope", None, "nothing to delete", "shoal list"),
    "delete a section": (["~clients"], "clients", None, "a value is needed", ""),
    "delete a group": (["~model"], "model", None, "a value is needed", ""),
    "unknown reference": (["name=${oops}"], "name", "${oops}", "'oops' not found", ""),
    "unknown resolver": (["name=${oops:1}"], "name", "${oops:1}", "interpolation type oops", ""),
    "missing value": (["name=???"], "name", "???", "Missing mandatory value", ""),
    "hydra's own": (["hydra.nope=1"], "hydra.nope", "1", "no such setting", ""),
    "wrong type": (["schedule.rounds=two"], "schedule.rounds", "two", "a whole number", ""),
    "fraction": (["clients.number=2.5"], "clients.number", 2.5, "a whole number", ""),
    "out of range": (["local.lr=0"], "local.lr", 0.0, "> 0", ""),
    "below zero": (["seed=-1"], "seed", -1, ">= 0", ""),
    "infinite": (["local.lr=inf"], "local.lr", float("inf"), "> 0", ""),
    "no truth value": (["report=maybe"], "report", "maybe", "true or false", ""),
    "not a choice": (["engine.dtype=float16"], "engine.dtype", "float16", "one of auto, float32, bfloat16", "bfloat16"),
    "no device": (["engine.device=tpu"], "engine.device", "tpu", "auto, cpu, cuda", ""),
    "cohort of none": (["engine.cohort_size=0"], "engine.cohort_size", 0, ">= 1", ""),
    "neither steps nor epochs": (["local.steps=null"], "local.steps", None, "has to be given", "local.steps=5"),
    "epsilon alone": (["privacy.epsilon=3"], "privacy.epsilon", 3.0, "no privacy mechanism", "epsilon=null"),
    "more than there are": (["clients.per_round=11"], "clients.per_round", 11, "clients.number, which is 10", ""),
    "a name that is a path": (["name=a/b"], "name", "a/b", "a folder's", ""),
    "a target": (["local._target_=os.system"], "local._target_", "os.system", "a dataclass", ""),
    "the wrong target": (["local._target_=fl.network.Instant"], "local._target_", None, "a subclass of", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_key_the_value_what_is_allowed_and_the_way_out(case):
    words, key, value, allowed, way_out = WRONG[case]
    error = error_of(*words)
    assert error.key == key
    assert value is None or error.value == value
    assert allowed in error.allowed
    assert str(error).startswith(f"{key}={error.value!r} is not allowed: {error.allowed}.")
    assert way_out in str(error)


def test_the_wrong_word_is_found_among_others():
    assert error_of("seed=1", "local.lr=[", "name=x").key == "local.lr"
    assert error_of("seed=1", "partition=zzz", "name=x").key == "partition"
    assert error_of("seed=1", "name=${x}", "local.lr=1").key == "name"


# Sweeps


def test_a_sweep_is_the_product_of_its_lists_in_order():
    axes, jobs = expand(["experiment=quickstart", "partition.alpha=0.1,1,100", "local.steps=2", "seed=range(0,2)"])
    assert axes == {"partition.alpha": ["0.1", "1", "100"], "seed": ["0", "1"]}
    assert len(jobs) == 6
    assert jobs[1] == ["experiment=quickstart", "partition.alpha=0.1", "local.steps=2", "seed=1"]
    assert jobs[5] == ["experiment=quickstart", "partition.alpha=100", "local.steps=2", "seed=1"]


def test_without_a_list_there_is_one_job():
    assert expand(["seed=1", "adapter.target_modules=[a,b]"]) == ({}, [["seed=1", "adapter.target_modules=[a,b]"]])
    assert expand([]) == ({}, [[]])


def test_lists_of_options_of_lists_and_of_added_keys():
    axes, jobs = expand(["local=sgd,adamw", "adapter.target_modules=[query],[query,value]", "+adapter.options.r=2,4"])
    assert axes == {
        "local": ["sgd", "adamw"],
        "adapter.target_modules": ["[query]", "[query,value]"],
        "adapter.options.r": ["2", "4"],
    }
    assert jobs[0] == ["local=sgd", "adapter.target_modules=[query]", "+adapter.options.r=2"]
    assert len({tuple(job) for job in jobs}) == 8
    for job in jobs:
        compose([w for w in job if "options" not in w])


def test_quoted_commas_are_no_list_and_quotes_survive():
    axes, jobs = expand(["name='a,b','c d'", "hydra.sweep.dir='x,y'"])
    assert list(axes) == ["name"]
    assert [compose(job)[0]["name"] for job in jobs] == ["a,b", "c d"]
    assert compose(jobs[0])[1][SWEEP_DIR] == Path("x,y")


@pytest.mark.parametrize(
    ("words", "key"),
    [(["seed=1,2", "seed=3,4"], "seed"), (["local.lr=interval(0,1)"], "local.lr"), (["model=glob(*)"], "model"),
     (["seed=1,"], "seed"), (["seed"], "seed")],
)  # fmt: skip
def test_what_is_no_list_is_refused_by_name(words, key):
    with pytest.raises(ConfigError) as raised:
        expand(words)
    assert raised.value.key == key
    assert "\n" not in str(raised.value)


def test_flat_settings_have_dotted_keys():
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1], "f": {}}) == {"a.b": 1, "a.c.d": None, "e": [1], "f": {}}


@pytest.mark.parametrize(
    ("words", "init"),
    [
        (["adapter=lora_xs"], {"_target_": "clients.adapters.initial.lora_xs.LoRAXS", "std": 1e-5}),
        (["adapter/init=lora_xs"], {"_target_": "clients.adapters.initial.lora_xs.LoRAXS", "std": 1e-5}),
        (["adapter=lora_xs", "adapter.init.source=public"], {"source": "public"}),  # what was typed is not dropped
        (["adapter=lora_sb"], {"source": "public"}),
    ],
)
def test_what_a_preset_sets_inside_a_replaced_option_goes_with_it(words, init):
    found = compose(["experiment=fed_sb", *words])[0]["adapter"]["init"]
    assert found.items() >= init.items()
    assert ("source" in found) == ("source" in init)


def test_so_does_what_a_preset_has_from_another_one():
    assert "alpha" not in compose(["experiment=fedsvd", "partition=iid"])[0]["partition"]
    assert compose(["experiment=fedsvd"])[0]["partition"]["alpha"] == 0.5
