"""What is promised about privacy, and how the promise is kept and checked."""
