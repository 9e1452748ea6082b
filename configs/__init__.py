"""Hydra configuration groups, one folder a seam; `experiment/` has one preset a paper."""
