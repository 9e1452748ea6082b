"""The statement: its one line for a terminal."""

import pytest

from privacy.base import Statement

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
