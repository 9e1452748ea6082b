"""Adapters: one file a reparametrisation. Each says which tensors train and what weight change they stand for."""

from clients.adapters.base import Adapter, LowRank

__all__ = ["Adapter", "LowRank"]
