"""The ClientApp of the installed Shoal, for stock SuperNodes."""

from fl.engine.session import app

__all__ = ["app"]
