"""What can be shown against a claimed epsilon: statistics that bound it from below."""
