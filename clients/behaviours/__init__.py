"""What a faulty or hostile client does instead of what it was asked for; one file a behaviour."""
