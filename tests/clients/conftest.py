"""A cache of its own for every test that asks for it."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    monkeypatch.setenv("SHOAL_CACHE", str(root))
    return root
