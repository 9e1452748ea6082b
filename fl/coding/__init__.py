"""Gradient coding: workers that hold the same data compute overlapping shares, so that a gradient needs only some."""
