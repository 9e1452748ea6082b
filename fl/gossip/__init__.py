"""Methods of peers that act at the events of clocks, each in its own time: DADAO, A2CiD2, AD-PSGD."""
