"""What a data holder trains on: sources, their tokens, and who holds what."""
