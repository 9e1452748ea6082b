"""The slow twins of `fl.fleet` and of its Gilbert-Elliott clients: tick by tick, and job by job from the first."""

from collections import deque
from collections.abc import Callable, Sequence


def fifo(messages: Sequence[tuple[int, int]]) -> list[int]:
    """When each message has passed a link. ``messages`` are (tick at which it is ready, ticks on the link).

    Those ready at the same tick take their turns in the order of the list.
    """
    waiting: deque[int] = deque()
    passed: dict[int, int] = {}
    on_link, left, now = -1, 0, 0
    while len(passed) < len(messages):
        waiting.extend(i for i, (ready, _) in enumerate(messages) if ready == now)
        while True:
            if on_link < 0 and waiting:
                on_link = waiting.popleft()
                left = messages[on_link][1]
            if on_link < 0 or left:
                break
            passed[on_link], on_link = now, -1
        left -= on_link >= 0
        now += 1
    return [passed[i] for i in range(len(messages))]


def work(start: int, length: int, on: Callable[[int], bool], on_leave: str) -> tuple[int, bool]:
    """When ``length`` ticks of work are over, or its client left: (tick, whether they are over)."""
    now = start
    while length:
        if on_leave == "lose" and not on(now):
            return now, False
        length -= on_leave == "finish" or on(now)
        now += 1
    return now, True


def chain(uniforms: Sequence[float], p_gb: float, p_bg: float) -> list[bool]:
    """Which jobs are bad in a two-state chain that begins in its stationary distribution, one number for each job."""
    states = [uniforms[0] < p_gb / (p_gb + p_bg)]
    for u in uniforms[1:]:
        states.append(u < (1 - p_bg if states[-1] else p_gb))
    return states
