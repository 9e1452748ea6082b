"""Generated sentences with labels, for tests: small enough to hold in memory, regular enough to be learnt.

Each sentence is one of a few patterns around a topic (its group) and an opinion (its label). Every choice comes from
a fixed key, so the set is the same everywhere.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fl.keys import generator

LABELS = ("negative", "neutral", "positive")
TOPICS: dict[str, tuple[str, ...]] = {
    "boats": ("ferry", "canoe", "sail", "anchor"),
    "food": ("soup", "bread", "salad", "pie"),
    "music": ("song", "drum", "choir", "violin"),
    "travel": ("train", "hotel", "map", "museum"),
    "weather": ("rain", "wind", "sun", "fog"),
    "work": ("desk", "meeting", "report", "office"),
}
OPINIONS: dict[str, tuple[str, ...]] = {
    "negative": ("awful", "broken", "dull", "bitter", "ugly", "poor"),
    "neutral": ("plain", "usual", "average", "ordinary", "common", "regular"),
    "positive": ("lovely", "bright", "great", "sweet", "superb", "fine"),
}
PATTERNS = (
    "the {thing} was {opinion}",
    "we found the {thing} very {opinion} today",
    "my friend said that the {thing} is {opinion}",
    "a {opinion} {thing} and nothing else",
    "yesterday the {thing} near the old harbour seemed {opinion} to all of us",
)
PER_TOPIC = 40


class Sentence(NamedTuple):
    text: str
    label: int
    topic: int


def sentences() -> list[Sentence]:
    """240 sentences: 40 for each of 6 topics, with labels as even as they come."""
    out = []
    for topic, things in enumerate(TOPICS.values()):
        for number in range(PER_TOPIC):
            draw = generator(0, "sentences", topic, number)
            label = number % len(LABELS)
            opinions = OPINIONS[LABELS[label]]
            text = PATTERNS[draw.integers(len(PATTERNS))].format(
                thing=things[draw.integers(len(things))], opinion=opinions[draw.integers(len(opinions))]
            )
            out.append(Sentence(text, label, topic))
    return out


def vocabulary() -> list[str]:
    """Every word that a sentence can have, sorted."""
    texts = (*PATTERNS, *(w for group in (*TOPICS.values(), *OPINIONS.values()) for w in group))
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", re.sub(r"{\w+}", "", text))})
