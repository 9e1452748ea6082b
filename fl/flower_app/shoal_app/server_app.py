"""The ServerApp of the installed Shoal."""

from fl.engine.superlink import app

__all__ = ["app"]
