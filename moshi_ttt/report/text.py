"""The words of a report: what a generation shows, captions and the glossary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moshi_ttt.clock import Clock
from moshi_ttt.diagnosis.jumps import Jump, ratios_at
from moshi_ttt.instruments.trace import Trace

NEAR_STEPS = 50  # a jump within one window of a position may belong to it
NOTICEABLE = 0.05  # relative change of a norm that is worth a word

CAPTIONS = {
    "input_norm": "L2 norm of what enters each layer (the old notes called it resid). Bands: "
    "middle half of the streams. Dashed: structural positions. Red: jumps that were found.",
    "heat_map": "The same norms relative to each layer's own level just after the prompt: red "
    "is growth, blue is decline. Diamonds: layers that take part in a jump.",
    "memory": "What the memory adds to the residual stream, relative to the residual; and its "
    "norm before the gate, which itself does not change during a run.",
    "flagged": "What of each stream went bad, in windows, and why: grey was looked at, a colour "
    "says that a measure passes what held-out real speech gives.",
    "contributions": "What attention and the feed-forward block add to the residual stream in "
    "each layer, and the largest single channel of the layer's input: a massive activation that "
    "moves or disappears is seen here before it is seen in the norm.",
    "fast_weights": "Whether the memory adapts: how far its fast weights are from where they "
    "began, and their norm (looked at every 16 steps); how strongly each step is written, and how "
    "much is forgotten a step, means over the heads; and how often they were updated. What stays "
    "the same throughout is left out.",
    "attention_mass": "Share of the attention that the layers looked at spend on position 0, on "
    "the first positions together, and on the oldest quarter of the ring; means over heads. "
    "0 after the key has left the ring.",
    "pace": "Text padding and repetition over the 10 s before each step (a trigram that was said "
    "in the 10 s before counts as repeated), and the time each step took.",
    "entropy": "How undecided the model is about its next text token and its next first-codebook "
    "token. A fall towards 0 often goes with repetition.",
    "nll": "Loss on real recordings that are fed in, not generated. Flat where the norms of the "
    "free generation rise, it speaks for the model's own output as the cause; rising with them, "
    "for the position.",
    "recall": "Held-out recordings in which the user says a fact and asks for it later, fed in, "
    "not generated. Shown is whether the words of the answer are Moshi's likeliest, given that "
    "a word is spoken. Own: Moshi has repeated the fact; heard: only the user has said it. Bands: "
    "95 % intervals. Beyond C, attention no longer reaches the fact directly. Thin lines, if the "
    "model has a memory: the same questions with the memory reset just before them, and exchanged "
    "for another conversation's. What the memory does is the distance from the thick line to both.",
    "asked": "The same answers, beyond the window alone, by when they were asked for: a memory "
    "that fills up answers less and less, late in a conversation.",
    "audio": "The first stream: spectrogram of Moshi's voice, the words of its text where they "
    "begin, and in orange when the user talks. White: structural positions.",
}
COMPARISON_CAPTIONS = {
    "input_norm": "Input norm of four layers from the first to the last. Dashed: structural "
    "positions, grey where all runs share them, else in the colour of the run.",
    "signals": "Branch ratio (mean over hybrid layers, 0 for vanilla Moshi) and entropies.",
    "nll": CAPTIONS["nll"],
    "recall": "The answers of held-out recordings, fed in, not generated, with each run's memory "
    "kept. Own: Moshi has repeated the fact; heard: only the user has said it. Bands: 95 % "
    "intervals. Beyond C, attention no longer reaches the fact directly.",
}
GLOSSARY = {
    "step": "One position of Moshi's temporal transformer, one codec frame, 80 ms (12.5 a second). "
    "One slot of the attention ring holds one step.",
    "legacy token": "The clock of the notes that this project started from: 8 codebooks x 12.5 Hz "
    "= 100 a second. Legacy token 6000 is 60 s, which is step 750. It is easy to take for a step: "
    "step 6000 is 480 s. A ring of 3000 slots therefore lasts 240 s, not 30 s. That is why every "
    "position in this report is given in all three clocks.",
    "C, capacity": "Slots of an attention ring, in steps: how far back a layer can look.",
    "end offset": "Steps written to a ring since it was reset.",
    "sinks": "First positions that a ring never evicts; stock Moshi has none.",
    "fast weights": "What the memory changes while the model runs; its slow weights are trained. "
    "How far they come is the L2 norm of what parts them from where they began, in words relative "
    "to their own norm: 0 % as they began, 100 % if they began at zero.",
    "evicted": "Steps that have been overwritten: end offset - capacity, or 0.",
    "turns": "How often writing has gone back to slot 0.",
    "jump": "A lasting rise of a layer's input norm at one position: the median of the 50 steps "
    "after it against the 50 steps before it, in at least three quarters of the streams, clearly "
    "above the layer's usual variation, and held afterwards. scripts/attribute_jump.py measures a "
    "rise otherwise, by means of 40 steps and from 10 % on: it compares runs in pairs and "
    "resamples their streams, for which only means add up; one run by itself needs medians, which "
    "bursts do not move, and 15 %. Growth is a rise that a ramp fits clearly better than a step.",
    "score": "Size of a jump in units of the layer's usual variation from window to window.",
    "branch ratio": "Norm of what the memory adds over the norm of the residual it is added to.",
    "gate": "What the memory's output is multiplied by before it is added; 0 is plain Moshi.",
    "inner updates": "Times the memory changed its fast weights while the model ran.",
    "entropy": "Undecidedness of a prediction in nats; 0 is certain.",
    "NLL": "Negative log-likelihood of real tokens, in nats a token; lower is better.",
    "stream": "One generation of the batch: a prompt and a random seed.",
}
PROBE_GLOSSARY = {
    "memory probe": "A fact that the user mentions and asks for later; only the words of the "
    "answer that stand for the fact are measured.",
    "own": "A probe whose fact Moshi has repeated: fact and answer are both in its own text.",
    "heard": "A probe whose fact only the user has said: Moshi must have understood it.",
    "unseen": "A probe of which something (template, key or value) is in no training recording; "
    "scored apart from the others of its class.",
    "reset": "A control: the memory is emptied to its learned start just before each question.",
    "exchanged": "A control: just before each question the memory is replaced by what another "
    "conversation left. Only what is lost in both controls was the memory's own doing.",
    "said since": "Other facts of the same kind, whoever said them, between the last mention of a "
    "fact and the question for it: what a memory may take for it.",
    "gap": "Seconds from the end of the last mention of a fact to the start of the question.",
    "chance": "Share of answer words right by guessing among the values of the kind, e.g. 10 % for "
    "a digit.",
}


def clock_note(clock: Clock) -> str:
    """How long a step is, in the other two clocks."""
    return (
        f"One step is {1000 * clock.step_sec:g} ms; "
        f"100 steps are {clock.seconds(100):g} s or {clock.legacy_tokens(100)} legacy tokens."
    )


def findings(trace: Trace, jumps: Sequence[Jump]) -> list[str]:
    """What the first sentences of a report do not say: each jump, and what happens at C and 2C."""
    lines = []
    clock, critical = trace.clock, trace.critical_steps()
    if only_reads(trace):
        lines.append("Nothing was generated: recordings were fed in throughout (teacher-forced).")
    for jump in sorted(jumps, key=lambda one: -one.ratio):
        kind = "Growth, no jump" if jump.gradual else "Jump"
        line = f"{kind}: {jump.describe(clock)}; {jump.agreement:.0%} of the streams rise."
        if jump.gradual:  # it has no one place, to be near to another
            lines.append(line)
            continue
        if jump.distance_steps is None or abs(jump.distance_steps) > NEAR_STEPS:
            line += " No structural position is near."
        elif jump.nearest is not None and " = " in jump.nearest:
            line += (
                " These positions coincide in this run, so it cannot tell which one matters; "
                "change the context or the clip length to part them."
            )
        lines.append(line)
    for name in ("C", "2C"):
        if name in critical:
            lines.append(
                f"At {name}, {clock.describe(critical[name])}: {_change(trace, critical[name])}."
            )
        else:
            step = trace.context_steps * (1 if name == "C" else 2)
            lines.append(f"{name}, {clock.describe(step)}, lies beyond the end of this run.")
    broken = ~np.isfinite(trace.input_norm).all(axis=(1, 2))
    if broken.any():
        lines.append(
            f"Norms of {broken.sum()} of {len(broken)} streams are not finite throughout; "
            "they are left out of the search for jumps in the layers concerned."
        )
    return lines


def only_reads(trace: Trace) -> bool:
    """Whether recordings were forced throughout, so that nothing was generated."""
    return bool(trace.prompt_steps) and not trace.free_from


def loudest_memory(trace: Trace) -> tuple[int, float]:
    """Layer whose memory adds most, and its branch ratio: median over streams and free steps."""
    per_layer = np.median(trace.branch_ratio[..., trace.free_from :], axis=(0, 2))
    top = int(np.argmax(per_layer))
    return trace.hybrid_layers[top], float(per_layer[top])


def _change(trace: Trace, step: int) -> str:
    ratios = ratios_at(trace, step)
    if not np.isfinite(ratios).any():
        return "too close to an end of the run to compare before and after"
    middle = float(np.nanmedian(ratios))
    most = int(np.nanargmax(np.abs(np.log(ratios))))
    word = "practically unchanged"
    if abs(middle - 1) >= NOTICEABLE:
        word = "higher afterwards" if middle > 1 else "lower afterwards"
    return (
        f"input norm x{middle:.2f} over the layers, {word}; "
        f"most in layer {most}, x{ratios[most]:.2f}"
    )
