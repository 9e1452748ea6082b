"""Methods without a server and without rounds: states of all peers, events on clocks, and nothing of Flower."""
