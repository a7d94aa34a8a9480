"""What the memory probes say, in words and in a table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report import html
from moshi_ttt.report.recall import CLASSES, GROUP_NAMES, shown_groups
from moshi_ttt.teacher_forcing.controls import (
    EVERYONE,
    Recalls,
    Share,
    beyond_window,
    by_rivals,
    memory_verdict,
)

RIVALS_SAID = {0: "none", 1: "one", 2: "two or more"}
"""How many rivals a fact had, in words."""


def recall_finding(trace: Trace, recalls: Recalls) -> str:
    """Recall within the attention window and beyond it, what the controls give, and the verdict."""
    window_sec = trace.clock.seconds(trace.context_steps)
    kept = [recalls["kept"][group] for group in shown_groups(recalls["kept"])]
    gaps, words, right, chance = (
        np.concatenate([np.array(one[name]) for one in kept])
        for name in ("gap_sec", "words", "accuracy", "chance")
    )

    def part(inside: np.ndarray) -> str:
        if not inside.any():
            return "no probe was asked"
        share = np.average(right[inside], weights=words[inside])
        span = f"about {gaps[inside].min():g} to {gaps[inside].max():g} s"
        return f"{share:.0%} of {words[inside].sum():.0f} words are right ({span})"

    within = gaps <= window_sec
    guessed = np.average(chance, weights=words)
    sentences = [
        f"Asked for a fact that was last mentioned within the attention window of "
        f"{window_sec:g} s, {part(within)}; beyond it, {part(~within)}.",
        f"Guessing among the values of the kind would give {guessed:.0%}.",
    ]
    pools = beyond_window(recalls, window_sec)
    classes = [
        f"{GROUP_NAMES[group]} {percent(pools[group]['kept'])}"
        for group in GROUP_NAMES
        if "kept" in pools.get(group, {})
    ]
    if len(classes) > 1:
        sentences.append(f"By class, beyond the window: {'; '.join(classes)}.")
    return " ".join([*sentences, *_controls(pools.get(EVERYONE, {}), pools)])


def rivals_finding(recalls: Recalls, trace: Trace) -> list[str]:
    """A sentence on own facts by how many others of their kind were said since, if it is known."""
    window_sec = trace.clock.seconds(trace.context_steps)
    kept = by_rivals(recalls, window_sec, "own").get("kept", {})
    if len(kept) < 2:
        return []
    shares = ", ".join(f"{RIVALS_SAID[at]} {percent(kept[at])}" for at in sorted(kept))
    return [
        "By how many other facts of their kind were said since, own facts beyond the window: "
        f"{shares}. Where this falls, facts may be mixed up rather than forgotten."
    ]


def percent(share: Share) -> str:
    """A share and its interval."""
    low, high = share.interval
    return f"{share.share:.0%} ({low:.0%} to {high:.0%} of {share.words:.0f} words)"


def _controls(shares: Mapping[str, Share], pools: Mapping[str, Mapping[str, Share]]) -> list[str]:
    """What the questions beyond the window give without the memory that was kept."""
    verdict = memory_verdict(shares)
    if verdict == "no memory":
        return []
    said = {"reset": "taken away just before the question", "other": "of another conversation"}
    given = [f"{percent(shares[one])} with a memory {said[one]}" for one in said if one in shares]
    sentences = [f"The same questions beyond the window: {', '.join(given)}."]
    used = [group for group in CLASSES if memory_verdict(pools.get(group, {})) == "used"]
    if used or verdict == "used":
        of = f" (shown for {' and '.join(used)} facts)" if used else ""
        return [*sentences, f"So the memory is used{of}."]
    missing = [one for one in said if one not in shares]
    why = (
        "with a single recording there is no other conversation's memory to compare with"
        if missing
        else "recall with the memory kept is not clearly above both"
    )
    return [*sentences, f"That the memory is used is not shown: {why}."]


def recall_numbers(recalls: Recalls | None) -> list[str]:
    """All of `probes.json` as a table behind a fold; nothing without probes."""
    if recalls is None:
        return []
    header = ("class", "memory", "gap (s)", "words", "right", "from", "to", "chance", "NLL (nats)")
    rows = [
        (GROUP_NAMES[group], memory, *(f"{gap:g}", f"{words:g}"), right, low, high, chance, nll)
        for group in GROUP_NAMES
        for memory, recall in recalls.items()
        if group in recall
        for gap, words, right, low, high, chance, nll in zip(
            *(
                recall[group][name]
                for name in ("gap_sec", "words", "accuracy", "low", "high", "chance", "nll")
            ),
            strict=True,
        )
    ]
    return [html.folded("Recall of planted facts, all numbers", html.table(header, rows))]
