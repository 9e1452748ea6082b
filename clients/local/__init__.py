"""Local algorithms: what a client does with its start state and its batches. One file an algorithm."""
