"""Just One Byte: replicas of one model that peers keep equal by exchanging scalars."""
