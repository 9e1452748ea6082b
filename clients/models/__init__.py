"""Base models: a frozen network that every client shares, its tokenizer and its head.

Each class is one option of the ``model=`` group; see docs/models.md.
"""

from clients.models.base import Base, ModelSpec
from clients.models.hub import HubModel
from clients.models.minilm import MiniLM
from clients.models.saved import load_for_adapter
from clients.models.shape import Shape
from clients.models.smollm2 import SmolLM2
from clients.models.tiny import TinyDecoder, TinyEncoder

__all__ = [
    "Base",
    "HubModel",
    "MiniLM",
    "ModelSpec",
    "Shape",
    "SmolLM2",
    "TinyDecoder",
    "TinyEncoder",
    "load_for_adapter",
]
