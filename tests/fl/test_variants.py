"""What a sweep runs: a preset's section `sweep:`, what the command line changes of it, and what is wrong with one."""

import copy

import pytest
import yaml

from fl.compose import compose, sweep_section
from fl.errors import ConfigError
from fl.experiment import Settings
from fl.listing import list_groups
from fl.variants import named, plan, text

SECTION = {
    "axes": {"seed": [0, 1]},
    "tune": {"key": "local.lr", "by": "clients"},
    "target": 0.8,
    "variants": {
        "small": {"set": ["adapter.rank=2"], "tune": [1e-4, 0.003]},
        "large": {"set": ["adapter.rank=8", "local=sgd"], "tune": [0.01]},
    },
}


@pytest.fixture
def duel(tmp_path):
    """The words that choose a preset, once it has been written with its section."""

    def write(section=SECTION, **more) -> list[str]:
        (tmp_path / "experiment").mkdir(exist_ok=True)
        content = {"defaults": [{"override /model": "tiny-encoder"}, {"override /data": "tiny"}], "name": "duel"}
        body = yaml.safe_dump({**content, "sweep": section, **more}, sort_keys=False)
        (tmp_path / "experiment" / "duel.yaml").write_text(f"# @package _global_\n# a preset of the tests\n{body}")
        return [f"hydra.searchpath=[file://{tmp_path}]", "experiment=duel"]

    return write


def changed(path: str, value) -> dict:
    section = copy.deepcopy(SECTION)
    *parents, last = path.split(".")
    place = section
    for name in parents:
        place = place[name]
    place[last] = value
    return section


def words_of(planned) -> list[list[str]]:
    return [[w for w in job.words if not w.startswith("hydra.")] for job in planned.jobs]


def test_jobs_are_variants_times_their_values_times_axes(duel):
    planned = plan(duel())
    first = ["experiment=duel", "adapter.rank=2"]
    second = ["experiment=duel", "adapter.rank=8", "local=sgd"]
    assert words_of(planned) == [
        [*first, "local.lr=0.0001", "seed=0"],
        [*first, "local.lr=0.0001", "seed=1"],
        [*first, "local.lr=0.003", "seed=0"],
        [*first, "local.lr=0.003", "seed=1"],
        [*second, "local.lr=0.01", "seed=0"],
        [*second, "local.lr=0.01", "seed=1"],
    ]
    assert [job.variant for job in planned.jobs] == ["small"] * 4 + ["large"] * 2
    assert planned.jobs[3].varied == {"local.lr": "0.003", "seed": "1"}
    assert planned.jobs[3].label == "small  local.lr=0.003  seed=1"
    assert planned.compares_variants
    assert planned.about == {
        "axes": {"seed": [0, 1]},
        "common": ["experiment=duel"],
        "variants": {
            "small": {"set": ["adapter.rank=2"], "tune": [1e-4, 0.003]},
            "large": {"set": ["adapter.rank=8", "local=sgd"], "tune": [0.01]},
        },
        "tune": {"key": "local.lr", "by": "clients"},
        "target": 0.8,
    }
    resolved = compose(planned.jobs[4].words)[0]
    assert Settings.of(resolved).adapter.rank == 8
    assert resolved["local"]["lr"] == 0.01
    assert resolved["local"]["_target_"].endswith("LocalTraining")


def test_the_command_line_wins(duel):
    words = duel()
    planned = plan([*words, "seed=5"])
    assert planned.about["axes"] == {}
    assert "seed=5" in planned.about["common"]
    assert [job.varied for job in planned.jobs] == [{"local.lr": v} for v in ("0.0001", "0.003", "0.01")]
    assert all(job.words.count("seed=5") == 1 for job in planned.jobs)
    assert [job.varied["seed"] for job in plan([*words, "seed=7,8,9", "local.lr=0.1"]).jobs] == ["7", "8", "9"] * 2
    one = plan([*words, "local.lr=0.1"])
    assert one.about["variants"]["small"] == {"set": ["adapter.rank=2"], "tune": []}
    assert [job.varied for job in one.jobs] == [{"seed": "0"}, {"seed": "1"}] * 2
    assert all("local.lr=0.1" in job.words and "local.lr=0.01" not in job.words for job in one.jobs)
    grid = plan([*words, "local.lr=0.1,0.2", "seed=0"])
    assert [job.varied["local.lr"] for job in grid.jobs] == ["0.1", "0.2"] * 2
    assert grid.about["variants"]["large"]["tune"] == [0.1, 0.2]
    rank = plan([*words, "adapter.rank=4", "seed=0"])
    assert [compose(job.words)[0]["adapter"]["rank"] for job in rank.jobs] == [4, 4, 4]
    assert rank.about["variants"]["large"]["set"] == ["local=sgd"]


def test_some_variants_further_axes_and_another_target(duel):
    words = duel()
    assert {job.variant for job in plan([*words, "variants=large"]).jobs} == {"large"}
    both = plan([*words, "variants=large,small"])
    assert list(both.about["variants"]) == ["small", "large"]  # the section's order
    assert not any(w.startswith("variants") for job in both.jobs for w in job.words)
    crossed = plan([*words, "variants=large", "clients.number=4,6"])
    assert [list(job.varied.values()) for job in crossed.jobs] == [
        ["0.01", "0", "4"], ["0.01", "0", "6"], ["0.01", "1", "4"], ["0.01", "1", "6"],
    ]  # fmt: skip
    assert crossed.about["axes"] == {"seed": [0, 1], "clients.number": [4, 6]}
    other = plan([*words, "sweep.target=0.5", "sweep.variants.small.tune=[1]", "variants=small", "seed=0"])
    assert other.about["target"] == 0.5
    assert [job.varied for job in other.jobs] == [{"local.lr": "1"}]
    assert not any("sweep" in w for words in words_of(other) for w in words)


def test_values_for_all_variants_and_variants_that_are_not_tuned(duel):
    section = changed("tune.values", [0.1, 0.2])
    section["variants"] = {"a": {}, "b": {"tune": [0.3]}}
    assert [job.varied["local.lr"] for job in plan([*duel(section), "seed=0"]).jobs] == ["0.1", "0.2", "0.3"]
    section = {"variants": {"a": {}, "b": {"set": ["adapter.rank=2"]}}}
    planned = plan(duel(section))
    assert [(job.variant, job.varied) for job in planned.jobs] == [("a", {}), ("b", {})]
    assert planned.about["tune"] is None and planned.about["target"] is None
    section = {"axes": {"clients.number": [2, 3]}, "variants": {"a": {}}}
    assert [job.varied for job in plan(duel(section)).jobs] == [{"clients.number": "2"}, {"clients.number": "3"}]
    section = changed("variants.large.tune", [])  # it keeps the preset's own value
    assert [job.varied for job in plan([*duel(section), "variants=large", "seed=0"]).jobs] == [{}]


def test_values_are_written_as_on_the_command_line():
    values = [None, True, 1e-5, 3, "name", [4, [8, None]], {"r": 2, "on": False}]
    assert [text(v) for v in values] == ["null", "true", "1e-05", "3", "name", "[4,[8,null]]", "{r:2,on:false}"]
    section = {"variants": {"a": {"set": ["adapter=peft", f"adapter.options={text({'r': 2})}"]}}}
    assert compose(section["variants"]["a"]["set"])[0]["adapter"]["options"] == {"r": 2}


def test_a_run_of_such_a_preset_knows_nothing_of_the_section(duel, tmp_path):
    words = duel()
    resolved, _ = compose([*words, "clients.number=3"])
    assert "sweep" not in resolved
    assert Settings.of(resolved).name == "duel"
    assert sweep_section(words) == SECTION
    assert sweep_section(["experiment=quickstart"]) is None
    for word in ("sweep.target=1", "variants=small"):
        with pytest.raises(ConfigError) as raised:
            Settings.of(compose([*words, word])[0])
        assert raised.value.key.partition(".")[0] == word.partition("=")[0].partition(".")[0]
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (option,) = list_groups(tmp_path)["experiment"]
    assert not [key for key in option.settings if key.startswith("sweep")]
    assert option.settings["name"] == "duel"


def test_without_a_section_a_sweep_is_that_of_its_lists():
    planned = plan(["experiment=quickstart", "partition.alpha=0.1,1", "seed=0,1", "local.steps=2", "hydra.sweep.dir=x"])
    assert not planned.compares_variants
    common = ["experiment=quickstart", "local.steps=2"]
    assert planned.about == {"axes": {"partition.alpha": [0.1, 1], "seed": [0, 1]}, "common": common}
    assert planned.jobs[1].label == "partition.alpha=0.1  seed=1"
    assert [job.variant for job in planned.jobs] == [None] * 4


WRONG = {
    "no section": (["a"], "sweep", "several settings"),
    "unknown key": (changed("goal", 1), "sweep.goal", "no such setting; sweep has axes, target, tune, variants"),
    "no variants": ({"axes": {"seed": [0]}}, "sweep.variants", "a value is needed"),
    "empty variants": (changed("variants", {}), "sweep.variants", "at least one variant"),
    "a list of variants": (changed("variants", ["small"]), "sweep.variants", "a mapping"),
    "a variant that is a list": (changed("variants.small", ["adapter.rank=2"]), "sweep.variants.small", "set, tune"),
    "unknown key of a variant": (changed("variants.small.lr", [1]), "sweep.variants.small.lr", "has set, tune"),
    "a name with a comma": (changed("variants.a,b", {}), "sweep.variants.a,b", "letters"),
    "a number as a name": (changed("variants.7", {}), "sweep.variants.7", "letters"),
    "a word without a value": (changed("variants.small.set", ["rank"]), "rank", "key=value"),
    "words that are no list": (changed("variants.small.set", "adapter.rank=2"), "sweep.variants.small.set", "list"),
    "a list in a variant": (
        changed("variants.small.set", ["adapter.rank=2,4"]),
        "sweep.variants.small.set",
        "one value",
    ),
    "a setting twice": (
        changed("variants.small.set", ["seed.x=1", "seed.x=2"]),
        "sweep.variants.small.set",
        "one value",
    ),
    "the tuned setting set": (changed("variants.small.set", ["local.lr=1"]), "sweep.variants.small.set", "the sweep"),
    "an axis set": (changed("variants.small.set", ["seed=1"]), "sweep.variants.small.set", "the sweep gives it"),
    "another preset": (changed("variants.small.set", ["experiment=x"]), "sweep.variants.small.set", "can't vary"),
    "an axis of presets": (changed("axes.experiment", ["x"]), "sweep.axes.experiment", "can't vary"),
    "an axis of folders": (changed("axes", {"hydra.run.dir": ["x"]}), "sweep.axes.hydra.run.dir", "can't vary"),
    "an empty axis": (changed("axes.seed", []), "sweep.axes.seed", "at least one"),
    "an axis of one value": (changed("axes.seed", 0), "sweep.axes.seed", "a list"),
    "a value twice": (changed("axes.seed", [0, 0]), "sweep.axes.seed", "once"),
    "a tuned value twice": (changed("variants.small.tune", [0.1, 0.1]), "sweep.variants.small.tune", "once"),
    "a tuned axis": (changed("tune.key", "seed"), "sweep.axes.seed", "no axis"),
    "values of nothing": (changed("tune", {}), "sweep.variants.small.tune", "sweep.tune.key"),
    "values of nothing for all": (changed("tune", {"values": [1]}), "sweep.tune.key", "whose values"),
    "tuned by the test set": (changed("tune.by", "test"), "sweep.tune.by", "one of clients"),
    "a target in words": (changed("target", "high"), "sweep.target", "a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_section_is_an_error_that_names_the_key(duel, case):
    section, key, allowed = WRONG[case]
    with pytest.raises(ConfigError) as raised:
        plan(duel(section))
    assert raised.value.key.startswith(key)
    assert allowed in str(raised.value)
    assert "section `sweep` of duel" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "key", "allowed"),
    [(["variants=smal"], "variants", "one of small, large. Did you mean small?"),
     (["variants=small,medium"], "variants", "one of small, large"),
     (["clients.number=1,2", "clients.number=3,4"], "clients.number", "one list")],
)  # fmt: skip
def test_wrong_words_for_a_sweep_of_variants(duel, words, key, allowed):
    with pytest.raises(ConfigError) as raised:
        plan([*duel(), *words])
    assert raised.value.key == key
    assert allowed in str(raised.value)


def test_variants_need_a_section_and_presets_with_one_are_swept_alone(duel):
    for word in ("variants=a", "variants=a,b"):
        with pytest.raises(ConfigError, match="there are no variants"):
            plan(["experiment=quickstart", word])
    search, _ = duel()
    with pytest.raises(ConfigError, match="duel has a sweep section"):
        plan([search, "experiment=quickstart,duel"])
    assert len(plan(["experiment=quickstart,instruct"]).jobs) == 2


def test_the_error_of_a_job_says_which_variant_it_is(duel):
    job = plan(duel()).jobs[-1]
    error = named(ConfigError("adapter.rank", 0, "a number >= 1", "Write 4."), job)
    assert str(error) == "adapter.rank=0 is not allowed: a number >= 1. Write 4. This is variant large."
    assert str(named(ConfigError("a", 0, "b"), job)) == "a=0 is not allowed: b. This is variant large."
    plain = plan(["seed=0"]).jobs[0]
    assert named(error, plain) is error


def test_the_sweep_of_privacy_utility_is_one_line_and_its_adapters_fit_its_settings():
    words = "privacy.epsilon=0.5,1,2,4,8 adapter=lora,ffa,lora_sb seed=0,1,2"
    planned = plan(["experiment=privacy_utility", *words.split()])
    assert len(planned.jobs) == 45 and not planned.compares_variants
    kinds = set()
    for job in planned.jobs[::3]:
        settings = Settings.of(compose(job.words)[0])
        assert settings.privacy.epsilon == float(job.varied["privacy.epsilon"])
        kinds.add((job.varied["adapter"], type(settings.adapter).__name__, settings.local.lr))
    assert kinds == {("lora", "LoRA", 2.0), ("ffa", "FFA", 2.0), ("lora_sb", "BRA", 2.0)}


def test_the_private_comparison_has_every_scheme_at_every_epsilon():
    planned = plan(["experiment=private_lowrank_comparison"])
    assert {job.varied["privacy.epsilon"] for job in planned.jobs} == {"1", "3", "6"}
    assert {job.varied["seed"] for job in planned.jobs} == {"0", "1", "2"}
    starts = {}
    for job in planned.jobs:
        if (job.varied["privacy.epsilon"], job.varied["seed"]) == ("1", "0"):
            settings = Settings.of(compose(job.words)[0])
            start = settings.adapter.initialisation
            starts[job.variant] = (type(settings.adapter).__name__, getattr(start, "source", None))
            assert type(settings.privacy).__name__ == "DPSGD"
    assert starts == {
        "fedit": ("LoRA", None), "ffa": ("FFA", None), "ffa_orthonormal": ("FFA", None), "fedsvd": ("FFA", None),
        "fed_sb_public": ("BRA", "public"), "fed_sb_private": ("BRA", "private"),
    }  # fmt: skip
