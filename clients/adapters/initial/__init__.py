"""Initialisations of low-rank adapters: one file each, from (weight, a statistic of data or none) to a start."""

from clients.adapters.initial.base import DataDriven, Initialisation, Start

__all__ = ["DataDriven", "Initialisation", "Start"]
