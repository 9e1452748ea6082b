"""What a server or a peer does with the updates that it receives."""
