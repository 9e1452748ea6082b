"""The statement's one line for a terminal, and which runs share noise."""

import pytest

from fl.compose import compose
from fl.experiment import Settings
from privacy.base import Statement, noise_root

CLAIM = {"unit": "example of one client", "relation": "adding or removing it", "accountant": "RDP", "delta": 0.0036}


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (
            Statement("DP-SGD", **CLAIM, epsilon=2.5, target=8.0),
            "DP-SGD: epsilon <= 8 for one example of one client (delta <= 0.0036, RDP); see run.json",
        ),
        (
            Statement("DP-SGD", **CLAIM, epsilon=0.0),
            "DP-SGD: epsilon as it is spent for one example of one client (delta <= 0.0036, RDP); see run.json",
        ),
        (
            Statement("DP-SGD", **CLAIM),
            "DP-SGD: no finite epsilon for one example of one client (delta <= 0.0036, RDP); see run.json",
        ),
        (Statement("Noise", unit="client"), "Noise: no finite epsilon for one client; see run.json"),
        (Statement("No privacy guarantee: no noise was added"), "No privacy guarantee; see run.json"),
    ],
)
def test_the_headline_never_gives_an_epsilon_without_its_unit_and_delta(made, line):
    assert made.headline() == line


@pytest.mark.parametrize(
    "word", ["local.lr=0.5", "privacy.noise_multiplier=2", "seed=1", "schedule.rounds=4", "adapter.rank=3"]
)
def test_runs_that_differ_in_what_they_release_share_no_noise(word):
    """With one seed: the difference of two runs under the same noise would hold gradients without any."""

    def root(*words: str) -> str:
        common = ["privacy=dp_sgd", "privacy.epsilon=null", "privacy.noise_multiplier=1", "model=tiny-encoder"]
        return noise_root(Settings.of(compose([*common, "data=tiny", *words])[0]))

    assert root() == root() != root(word)
    # How the work is laid out and what is recorded change nothing that is released.
    others = ["engine.cohort_size=3", "engine.workers=1", "evaluation.every=0", "report=false", "name=other"]
    assert root() == root(*others)
