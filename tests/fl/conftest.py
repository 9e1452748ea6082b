"""What tests of several parts of fl share."""

import pytest

from clients.models import TinyEncoder


@pytest.fixture
def loads(monkeypatch):
    """Counts how often a base model is loaded."""
    seen, load = [], TinyEncoder.load

    def watching(self, *arguments, **named):
        seen.append(named)
        return load(self, *arguments, **named)

    monkeypatch.setattr(TinyEncoder, "load", watching)
    return seen
