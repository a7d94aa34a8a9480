"""The sets of generated conversations: what is said in them, and how soon facts are asked for.

`train` is what a language model learns recall from, within clips of 20 s; `drill`, text alone, is
where it begins. `far` has long gaps, for a memory that is trained on long clips, `farther` some of
four minutes; in `crowded` those are of few kinds and easily mixed up. Held-out recordings have
topics, voices, keys, values and templates that none of these has: what is chosen is chosen on
`heldout`, and `final` is for the numbers that are reported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast facts follow one another, and how soon they are asked for."""

    gap_shares: dict[float, float]
    """Intended seconds from the last mention of a value to the question for it, and how often."""
    plant_every_sec: tuple[float, float]
    """From one planting to the next; asking takes time too."""


CALM = Pace(
    {4: 0.45, 10: 0.20, 20: 0.10, 40: 0.05, 60: 0.05, 90: 0.05, 120: 0.04, 180: 0.03, 240: 0.03},
    (7.0, 20.0),
)
DRILLS = (
    Pace({1: 0.4, 3: 0.4, 6: 0.2}, (0.5, 2.0)),
    Pace({1: 0.1, 3: 0.15, 6: 0.2, 8: 0.25, 10: 0.3}, (1.0, 4.0)),
)
"""Planted, asked and answered within a 20 s clip, again and again: to learn recall from."""
DENSE = Pace({0.5: 0.5, 2: 0.5}, (0.0, 0.5))
"""Hardly anything else: half as many updates until recall sets in."""
FAR = Pace(
    {4: 0.05, 10: 0.05, 20: 0.20, 40: 0.25, 60: 0.20, 90: 0.15, 120: 0.10},
    (1.0, 5.0),
)
"""Many facts alive at once, most of them asked for after a window of 15 s has lost them."""
FARTHER = Pace(
    {4: 0.05, 10: 0.05, 20: 0.15, 40: 0.20, 60: 0.15, 90: 0.12, 120: 0.10, 180: 0.10, 240: 0.08},
    FAR.plant_every_sec,
)
"""The same, and some of them minutes later: what a clip of 240 s can ask."""
SPREAD = Pace(dict.fromkeys(CALM.gap_shares, 1 / len(CALM.gap_shares)), (3.0, 9.0))
"""Every gap as often as any other: to measure with."""


@dataclass(frozen=True, slots=True)
class Split:
    """One set of conversations."""

    paces: tuple[Pace, ...]
    """Those of its conversations, each as often as any other."""
    own_share: float
    """How many facts are said again by whoever answers; of the others it says only that it will
    remember."""
    unseen_share: float = 0.0
    """How many probes have a template, a key or a value that no training recording has."""
    same_kind_share: float = 0.25
    """How often a fact is of a kind that is already to be asked for: only its key tells which."""
    held_out_topics: bool = False
    """Small talk about what no training recording is about."""
    held_out_voice_share: float = 0.0
    """How often the user has a voice that no training recording has."""


SPLITS = {
    "train": Split((CALM, *DRILLS), own_share=0.7),
    "far": Split((FAR,), own_share=0.7),
    "heldout": Split((SPREAD,), 0.5, 0.25, held_out_topics=True, held_out_voice_share=0.5),
    "final": Split((SPREAD,), 0.5, 0.5, held_out_topics=True, held_out_voice_share=1.0),
    # these last, because a recipe draws its random numbers by its place in here
    "drill": Split((DENSE, *DRILLS), own_share=1.0),
    "farther": Split((FARTHER,), own_share=0.7),
    "crowded": Split((FARTHER,), own_share=0.7, same_kind_share=0.8),
}
