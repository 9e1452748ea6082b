from pathlib import Path

import pytest
import yaml

from fl.config import build
from fl.errors import ConfigError
from privacy.base import Privacy
from privacy.none import NoPrivacy

CONFIG = Path(__file__).parents[2] / "configs" / "privacy" / "none.yaml"


def test_an_epsilon_that_nothing_keeps_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=8\.0 .*no privacy mechanism is active") as raised:
        build({"_target_": "privacy.none.NoPrivacy", "epsilon": 8}, "privacy", Privacy)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("epsilon", [0, -1.0])
def test_an_epsilon_has_to_be_positive_anyway(epsilon):
    with pytest.raises(ConfigError, match=r"privacy\.epsilon="):
        build({"_target_": "privacy.none.NoPrivacy", "epsilon": epsilon}, "privacy")


def test_none_says_so():
    privacy = build(yaml.safe_load(CONFIG.read_text()), "privacy", Privacy)
    assert privacy == NoPrivacy()
    assert privacy.epsilon is None
    guard = privacy.guard(None, [3], None)  # type: ignore[arg-type]
    assert guard.statement().text().startswith("No privacy guarantee:")
    assert guard.epsilon is None
