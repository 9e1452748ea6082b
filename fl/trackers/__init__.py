"""Trackers: where a run's events go besides metrics.jsonl. One file a service."""
