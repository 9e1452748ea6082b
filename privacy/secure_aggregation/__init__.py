"""Sums of clients' vectors that show nobody a single client's vector."""
