"""Speed, as ratios of two things measured in one run. Nothing here is a test."""
