"""Slow twins of `fl.topology`: weights by their definition, edge by edge, and message queues tick by tick."""

from __future__ import annotations

from fractions import Fraction


def metropolis_hastings(number: int, edges: list[tuple[int, int]]) -> list[list[Fraction]]:
    """W_ij = 1 / (1 + max(deg_i, deg_j)), W_ii = 1 - the rest of its row; exact."""
    known: list[set[int]] = [set() for _ in range(number)]
    for i, j in edges:
        known[i].add(j)
        known[j].add(i)
    matrix = [[Fraction(0)] * number for _ in range(number)]
    for i in range(number):
        for j in known[i]:
            matrix[i][j] = Fraction(1, 1 + max(len(known[i]), len(known[j])))
        matrix[i][i] = 1 - sum(matrix[i])
    return matrix


def column_stochastic(number: int, edges: list[tuple[int, int]]) -> list[list[Fraction]]:
    """Each peer splits its value evenly over itself and those that it sends to; exact."""
    matrix = [[Fraction(0)] * number for _ in range(number)]
    for source in range(number):
        told = [source, *(j for i, j in edges if i == source)]
        for target in told:
            matrix[target][source] = Fraction(1, len(told))
    return matrix


def reached(number: int, edges: list[tuple[int, int]], start: int) -> set[int]:
    """Whom a rumour from ``start`` gets to."""
    found = {start}
    while True:
        more = {j for i, j in edges if i in found} - found
        if not more:
            return found
        found |= more


def arrivals(
    messages: list[tuple[int, int, int, int]], up: dict[int, int], down: dict[int, int], latency: int
) -> dict[tuple[int, int], int]:
    """Arrival ticks when a byte takes ``up[i]`` and ``down[j]`` ticks, simulated one tick after the other."""
    waiting = sorted(messages, key=lambda m: (m[2], m[1]))
    flying: list[tuple[int, int, int, int]] = []  # reaches its receiver at, from, to, bytes
    up_left: dict[int, tuple[int, tuple[int, int, int, int]]] = {}
    down_left: dict[int, tuple[int, tuple[int, int, int, int]]] = {}
    done: dict[tuple[int, int], int] = {}
    tick = 0
    while len(done) < len(messages):
        for i, (until, message) in list(up_left.items()):
            if until == tick:
                del up_left[i]
                flying.append((tick + latency, *message[:2], message[3]))
        for j, (until, landed) in list(down_left.items()):
            if until == tick:
                del down_left[j]
                done[landed[1], landed[2]] = tick
        for message in list(waiting):
            i, _, ready, size = message
            if ready <= tick and i not in up_left:
                up_left[i] = (tick + size * up[i], message)
                waiting.remove(message)
        for landed in sorted(flying):
            at, _, j, size = landed
            if at <= tick and j not in down_left:
                down_left[j] = (tick + size * down[j], landed)
                flying.remove(landed)
        tick += 1
    return done
