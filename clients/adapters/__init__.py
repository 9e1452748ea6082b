"""Adapters: one file a reparametrisation. Each says which tensors train and what weight change they stand for."""

from clients.adapters.base import Adapter
from clients.adapters.space import LowRank

__all__ = ["Adapter", "LowRank"]
