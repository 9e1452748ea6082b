"""When things happen in an experiment, and what is recorded of it."""
